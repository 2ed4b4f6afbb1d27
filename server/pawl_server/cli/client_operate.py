"""`pawl models`, `requests`, `drain` and `cancel`: looking at a running server and steering it.

Owns what these commands do once their flags are parsed. Errors rise to `client_commands`.
"""

from __future__ import annotations

import argparse

from pawl import AdminClient, CancelOutcome
from pawl_server.cli.client_generate import connect
from pawl_server.cli.client_tls import encryption
from pawl_server.cli.render import print_json, print_table

__all__ = ["cancel", "drain", "models", "requests"]


def _connect_admin(arguments: argparse.Namespace) -> AdminClient:
    return AdminClient(
        arguments.admin_target,
        internal_token=arguments.internal_token_file,
        timeout=arguments.timeout,
        tls=encryption(arguments),
    )


def models(arguments: argparse.Namespace) -> int:
    """What is served."""
    with connect(arguments) as client:
        served = client.models.list()
    if arguments.json:
        print_json(served)
        return 0
    rows = [
        (
            model.id,
            ", ".join(model.architectures),
            model.max_context_tokens,
            model.vocab_size,
            model.data_type,
            "yes" if model.has_chat_template else "no",
            model.revision[:12],
        )
        for model in served
    ]
    print_table(("model", "architecture", "context", "vocabulary", "data type", "chat", "revision"), rows)
    return 0


def requests(arguments: argparse.Namespace) -> int:
    """What runs, what waits and why."""
    with _connect_admin(arguments) as admin:
        states = admin.requests()
    if arguments.json:
        print_json(states)
        return 0
    rows = [
        (
            state.request_id,
            state.phase,
            state.prompt_tokens,
            state.output_tokens,
            state.block_count,
            round(state.age, 1),
            state.preemption_count,
            state.replica,
            state.priority,
            state.queue_position or "",
            state.user,
            state.wait_reason or state.preemption_reason,
        )
        for state in states
    ]
    headers = (
        "request",
        "phase",
        "prompt",
        "output",
        "blocks",
        "age s",
        "preempted",
        "replica",
        "priority",
        "place",
        "user",
        "waits, or lost its blocks, because",
    )
    print_table(headers, rows)
    return 0


def drain(arguments: argparse.Namespace) -> int:
    """Stop taking requests; returns when nothing runs any more."""
    with _connect_admin(arguments) as admin:
        num_cancelled = admin.drain(grace=arguments.grace)
    print(f"drained; {num_cancelled} requests cancelled")
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """End running requests; 1 if one of them is not known."""
    with connect(arguments) as client:
        outcomes = client.cancel(*arguments.request_ids, reason=arguments.reason)
    if arguments.json:
        print_json(outcomes)
    else:
        for request_id, outcome in outcomes.items():
            print(f"{request_id}: {outcome.value.replace('_', ' ')}")
    return int(CancelOutcome.NOT_FOUND in outcomes.values())
