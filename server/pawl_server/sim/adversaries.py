"""Hostile load: chats that mean no harm, and something beside them that could ruin them.

The chats are of group "chat", what disturbs them is of group "adversary": reports judge a policy by the chats.
Every function takes (number of requests, arrivals per second, seed); the number counts chats and adversaries.
"""

from __future__ import annotations

import dataclasses
import random

from pawl_server.sim.arrivals import Arrivals
from pawl_server.sim.azure import drawn_rows
from pawl_server.sim.streams import Segment
from pawl_server.sim.trace import Fault, SimulatedRequest, Trace
from pawl_server.sim.workloads import MAX_OUTPUT_TOKENS, chat_requests

__all__ = [
    "abort_storm", "classes", "flood", "large_heads", "liars", "long_prompts", "prefix_burst", "urgent", "worker_kills",
]  # fmt: skip

_FIRST_ADVERSARY_STREAM = 1 << 28
_LONG_PROMPT_TOKENS = 100_000
_LARGE_PROMPT_TOKENS = 40_000


def _merged(name: str, chats: list[SimulatedRequest], others: list[SimulatedRequest]) -> Trace:
    return Trace(name, sorted([*chats, *others], key=lambda request: request.arrival_s))


def _chats(count: int, rate: float, seed: int, tenant: str = "") -> list[SimulatedRequest]:
    return chat_requests(drawn_rows(Arrivals(rate, seed=seed), count, seed), tenant=tenant)


def flood(count: int, rate: float, seed: int) -> Trace:
    """Three quiet tenants share a third of the arrivals; from a tenth of the time on, one sends the rest at once.

    The flood arrives four times as fast as its share, so that it is over before the quiet ones are.
    """
    num_quiet = count // 3
    quiet: list[SimulatedRequest] = []
    for number in range(3):
        rows = drawn_rows(Arrivals(rate / 9, seed=seed + number), num_quiet // 3, seed + number)
        quiet += chat_requests(rows, tenant=f"quiet {number + 1}", first_stream=number * count)
    begins_s = 0.1 * max(request.arrival_s for request in quiet)
    rows = drawn_rows(Arrivals(rate * 8 / 3, seed=seed + 3), count - len(quiet), seed + 3)
    flooding = [
        dataclasses.replace(request, arrival_s=begins_s + request.arrival_s, group="adversary")
        for request in chat_requests(rows, tenant="flood", first_stream=_FIRST_ADVERSARY_STREAM)
    ]
    return _merged("flood", quiet, flooding)


def long_prompts(count: int, rate: float, seed: int) -> Trace:
    """Chats, and every 500th request has a prompt of 100,000 tokens."""
    num_long = max(1, count // 500)
    chats = _chats(count - num_long, rate, seed)
    whole_s = chats[-1].arrival_s if chats else 1.0
    long = [
        SimulatedRequest(
            arrival_s=whole_s * (number + 0.5) / (num_long + 1),
            prompt=(Segment(_FIRST_ADVERSARY_STREAM + number, _LONG_PROMPT_TOKENS),),
            output_tokens=200,
            max_output_tokens=MAX_OUTPUT_TOKENS,
            tenant="",
            group="adversary",
        )
        for number in range(num_long)
    ]
    return _merged("long-prompts", chats, long)


def prefix_burst(count: int, rate: float, seed: int) -> Trace:
    """Chats; a fifth of all requests come within two seconds, in the middle, behind one prefix that nobody has yet."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    num_burst = count // 5
    chats = _chats(count - num_burst, rate, seed)
    middle_s = chats[len(chats) // 2].arrival_s
    burst = [
        SimulatedRequest(
            arrival_s=middle_s + draw.uniform(0.0, 2.0),
            prompt=(Segment(_FIRST_ADVERSARY_STREAM, 3000), Segment(_FIRST_ADVERSARY_STREAM + 1 + number, 50)),
            output_tokens=draw.randint(20, 200),
            max_output_tokens=MAX_OUTPUT_TOKENS,
            group="adversary",
        )
        for number in range(num_burst)
    ]
    return _merged("prefix-burst", chats, burst)


def liars(count: int, rate: float, seed: int) -> Trace:
    """Half of the requests declare 16,384 tokens of output and stop after a few, and nobody knows which half."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    requests = [
        dataclasses.replace(request, output_tokens=draw.randint(1, 20), max_output_tokens=16_384, group="adversary")
        if draw.random() < 0.5
        else request
        for request in _chats(count, rate, seed)
    ]
    return Trace("liars", requests)


def abort_storm(count: int, rate: float, seed: int) -> Trace:
    """Two of three clients hang up: half of those within 200 ms, the others within 10 s."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    requests = []
    for request in _chats(count, rate, seed):
        patience = draw.random()
        if patience < 1 / 3:
            requests.append(request)
            continue
        abort_after_s = draw.uniform(0.0, 0.2) if patience < 2 / 3 else draw.uniform(0.0, 10.0)
        requests.append(dataclasses.replace(request, abort_after_s=abort_after_s, group="adversary"))
    return Trace("abort-storm", requests)


def worker_kills(count: int, rate: float, seed: int) -> Trace:
    """Chats; the worker dies once a minute on average and is back after three seconds, without its KV."""
    chats = _chats(count, rate, seed)
    kills = []
    for due_s in Arrivals(1 / 60, seed=seed + 1).due_times():
        if due_s > chats[-1].arrival_s:
            break
        kills.append(Fault(due_s, 3.0))
    return Trace("worker-kills", chats, kills or [Fault(chats[-1].arrival_s / 2, 3.0)])


def classes(count: int, rate: float, seed: int) -> Trace:
    """A tenth of the requests are of a lower class than the rest, which alone nearly fill the replica."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    requests = [
        dataclasses.replace(request, priority=0 if draw.random() < 0.1 else 1) for request in _chats(count, rate, seed)
    ]
    return Trace("classes", requests)


def urgent(count: int, rate: float, seed: int) -> Trace:
    """Every fifth request is of class 9 and counts as a chat; the rest, of class 0, alone nearly fill the replica."""
    requests = [
        dataclasses.replace(request, priority=9) if number % 5 == 4 else dataclasses.replace(request, group="adversary")
        for number, request in enumerate(_chats(count, rate, seed))
    ]
    return Trace("urgent", requests)


def large_heads(count: int, rate: float, seed: int) -> Trace:
    """Chats, as many short calls that declare 8 tokens of output, and every 40th request has a prompt of 40,000."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    requests = []
    for number, request in enumerate(_chats(count, rate, seed)):
        stream = _FIRST_ADVERSARY_STREAM + number
        if number % 40 == 39:
            large = (Segment(stream, _LARGE_PROMPT_TOKENS),)
            requests.append(dataclasses.replace(request, prompt=large, group="adversary"))
        elif draw.random() < 0.5:
            short, num_output = (Segment(stream, draw.randint(50, 400)),), draw.randint(1, 8)
            requests.append(dataclasses.replace(request, prompt=short, output_tokens=num_output, max_output_tokens=8))
        else:
            requests.append(request)
    return Trace("large-heads", requests)
