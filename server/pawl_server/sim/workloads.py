"""Ordinary load: independent conversations, shared beginnings, conversations of many turns, agents with tools.

Every workload is a function of (number of requests, arrivals per second, seed) and nothing else. Lengths of single
requests are those of the published Azure conversation trace unless a docstring says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from pawl_server.sim.arrivals import Arrivals, OnOff
from pawl_server.sim.azure import TraceRow, drawn_rows
from pawl_server.sim.lengths import Lognormal
from pawl_server.sim.streams import Segment, output_stream
from pawl_server.sim.trace import SimulatedRequest, Trace

__all__ = [
    "MAX_OUTPUT_TOKENS",
    "Workload",
    "agents",
    "bursts",
    "chat_requests",
    "conversation",
    "from_rows",
    "multi_turn",
    "on_off",
    "several_samples",
    "system_prompts",
]

Workload = Callable[[int, float, int], Trace]
"""Number of requests, arrivals per second, seed."""

MAX_OUTPUT_TOKENS = 1024  # what an ordinary client declares

# Streams of prompts, apart from each other: one per request, and those that requests share.
_SHARED = 1 << 29


def chat_requests(rows: Sequence[TraceRow], *, tenant: str = "", first_stream: int = 0) -> list[SimulatedRequest]:
    """Independent requests with these times and lengths, each with a text of its own."""
    return [
        SimulatedRequest(
            arrival_s=row.due_s,
            prompt=(Segment(first_stream + number, row.prompt_tokens),),
            output_tokens=row.output_tokens,
            max_output_tokens=max(MAX_OUTPUT_TOKENS, row.output_tokens),
            tenant=tenant,
        )
        for number, row in enumerate(rows)
    ]


def from_rows(rows: Sequence[TraceRow], name: str) -> Trace:
    """A recorded trace."""
    return Trace(name, chat_requests(rows))


def conversation(count: int, rate: float, seed: int) -> Trace:
    """Independent requests, Poisson arrivals."""
    return from_rows(drawn_rows(Arrivals(rate, seed=seed), count, seed), "conversation")


def bursts(count: int, rate: float, seed: int) -> Trace:
    """Independent requests in bursts: gamma gaps with a coefficient of variation of 4."""
    return from_rows(drawn_rows(Arrivals(rate, 4.0, seed), count, seed), "bursts")


def on_off(count: int, rate: float, seed: int) -> Trace:
    """Independent requests that come for 20 s at three times the mean rate, then not for 40 s."""
    return from_rows(drawn_rows(OnOff(rate, 20.0, 40.0, seed), count, seed), "on-off")


def system_prompts(count: int, rate: float, seed: int) -> Trace:
    """Short questions behind one of 16 system prompts (256 to 4,096 tokens), the n-th used 1/n as often."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    lengths = [draw.randrange(256, 4097, 32) for _ in range(16)]
    question = Lognormal(120, 600, high=2000)
    requests = []
    for number, row in enumerate(drawn_rows(Arrivals(rate, seed=seed), count, seed)):
        (chosen,) = draw.choices(range(16), weights=[1 / (rank + 1) for rank in range(16)])
        requests.append(
            SimulatedRequest(
                arrival_s=row.due_s,
                prompt=(Segment(_SHARED + chosen, lengths[chosen]), Segment(number, question.draw(draw))),
                output_tokens=row.output_tokens,
                max_output_tokens=MAX_OUTPUT_TOKENS,
            )
        )
    return Trace("system-prompts", requests)


def several_samples(count: int, rate: float, seed: int) -> Trace:
    """Independent requests, one in four of which asks for 4 samples of its prompt. `rate` counts samples."""
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    answer = Lognormal(129, 424, high=601)
    requests: list[SimulatedRequest] = []
    for first in chat_requests(drawn_rows(Arrivals(rate / 1.75, seed=seed), count, seed)):
        index = len(requests)
        requests.append(first)
        number = 3 if draw.random() < 0.25 else 0
        requests += [replace(first, output_tokens=answer.draw(draw), sample_of=index) for _ in range(number)]
    return Trace("several-samples", requests[:count])


def multi_turn(count: int, rate: float, seed: int) -> Trace:
    """Conversations of 5 turns on average; a turn quotes all before it and comes a lognormal while (median 10 s) after.

    `rate` counts turns.
    """
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    begins = Arrivals(rate / 5, seed=seed).due_times()
    think, question, answer = Lognormal(100, 400), Lognormal(80, 400, high=2000), Lognormal(129, 424, high=601)
    requests: list[SimulatedRequest] = []
    while len(requests) < count:
        history: tuple[Segment, ...] = (Segment(_SHARED, 384),)
        arrival_s, follows = next(begins), -1
        while len(requests) < count:
            index, output = len(requests), answer.draw(draw)
            history = (*history, Segment(index, question.draw(draw)))
            requests.append(
                SimulatedRequest(
                    arrival_s=arrival_s, prompt=history, output_tokens=output, follows=follows,
                    max_output_tokens=MAX_OUTPUT_TOKENS,
                )
            )  # fmt: skip
            if draw.random() < 0.2:
                break
            history = (*history, Segment(output_stream(index), max(1, output - 1)))
            arrival_s, follows = think.draw(draw) / 10, index
    return Trace("multi-turn", requests)


def agents(count: int, rate: float, seed: int) -> Trace:
    """Agents that call tools: 2,048 shared tokens, then 12 rounds on average of a short output and a tool's answer.

    The gaps between rounds are the tools' (lognormal, median 1 s), and every round quotes all before it. `rate`
    counts rounds.
    """
    draw = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    begins = Arrivals(rate / 12, seed=seed).due_times()
    tool_gap, task = Lognormal(100, 800), Lognormal(200, 800, high=4000)
    call, tool_answer = Lognormal(60, 180, high=600), Lognormal(150, 1200, high=4000)
    requests: list[SimulatedRequest] = []
    while len(requests) < count:
        history: tuple[Segment, ...] = (Segment(_SHARED + 1, 2048), Segment(len(requests), task.draw(draw)))
        arrival_s, follows = next(begins), -1
        while len(requests) < count:
            index, output = len(requests), call.draw(draw)
            requests.append(
                SimulatedRequest(
                    arrival_s=arrival_s, prompt=history, output_tokens=output, follows=follows,
                    max_output_tokens=MAX_OUTPUT_TOKENS,
                )
            )  # fmt: skip
            if draw.random() < 1 / 12:
                break
            quoted = Segment(output_stream(index), max(1, output - 1))
            history = (*history, quoted, Segment(_SHARED + 2 + index, tool_answer.draw(draw)))
            arrival_s, follows = tool_gap.draw(draw) / 100, index
    return Trace("agents", requests)
