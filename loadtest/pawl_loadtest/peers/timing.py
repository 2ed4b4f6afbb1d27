"""Runs that are timed: of one engine alone, or of two that are both alive and take turns.

What a machine does changes within seconds where others share it, and from process to process. Two engines that run the
same right after one another, many times, in alternating order, are both met by it, so that the ratio of a pair is far
steadier than either's seconds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from pawl_loadtest.peers.cpu_time import cpu_seconds, spent
from pawl_loadtest.peers.driver import Driver, EngineError, tokens_of
from pawl_loadtest.peers.others import others_cores
from pawl_loadtest.peers.workloads import Workload

__all__ = ["RUN_TIMEOUT_S", "Timed", "generate", "time_alone", "time_pairs", "warm_up"]

RUN_TIMEOUT_S = 1800.0
_WARM_UP_TOKENS = 2
_WARM_UP_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Timed:
    """What a round yields for one workload.

    Attributes:
        seconds: of a run; the median of several.
        others: cores that neither the engine nor this process kept busy meanwhile; the most of several, the
            partner's runs included, beside which the engine is idle.
        ratios: for each pair, the partner's seconds over the engine's.
        cpu: CPU seconds of a run over gRPC by part, as `cpu_time` has them; the mean of several.
    """

    seconds: float
    others: float
    ratios: list[float] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)


def generate(driver: Driver, prompts: list[list[int]], output_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens, exactly so many, and the seconds that they took.

    Raises:
        EngineError: it failed, or gave fewer or more.
    """
    result = driver.call("generate", {"prompts": prompts, "output_tokens": output_tokens}, RUN_TIMEOUT_S)
    tokens = tokens_of(result)
    lengths = {len(sequence) for sequence in tokens}
    if len(tokens) != len(prompts) or lengths != {output_tokens}:
        raise EngineError(f"{len(prompts)} x {output_tokens} tokens were asked for; {len(tokens)} x {lengths} came")
    seconds = result["seconds"]
    if not isinstance(seconds, float) or seconds <= 0:
        raise EngineError(f"seconds are {seconds!r}")
    return tokens, seconds


def warm_up(driver: Driver, workload: Workload, vocab_size: int) -> None:
    """As many requests as the workload has, a few tokens of each."""
    short = Workload(workload.requests, min(workload.prompt_tokens, _WARM_UP_PROMPT_TOKENS), _WARM_UP_TOKENS)
    generate(driver, short.prompts(vocab_size, seed=2), short.output_tokens)


def time_alone(driver: Driver, prompts: list[list[int]], output_tokens: int) -> Timed:
    """One run."""
    with others_cores(driver.process_id) as others:
        _, seconds = generate(driver, prompts, output_tokens)
    return Timed(seconds, others.cores)


def time_pairs(partner: Driver, driver: Driver, prompts: list[list[int]], output_tokens: int, pairs: int) -> Timed:
    """So many runs of each, the one that begins a pair ending the next.

    Raises:
        EngineError: one failed, or their tokens differ.
    """
    seconds: list[float] = []
    others_most = 0.0
    ratios: list[float] = []
    cpu: dict[str, float] = {}
    for pair in range(pairs):
        took: dict[Driver, float] = {}
        said: dict[Driver, list[list[int]]] = {}
        for each in (partner, driver) if pair % 2 == 0 else (driver, partner):
            with others_cores(each.process_id) as others:
                before = cpu_seconds(driver.process_id) if each is driver else {}
                said[each], took[each] = generate(each, prompts, output_tokens)
                after = cpu_seconds(driver.process_id) if each is driver else {}
            others_most = max(others_most, others.cores)
            for part, seconds_of in spent(before, after).items():
                cpu[part] = cpu.get(part, 0.0) + seconds_of / pairs
        if said[partner] != said[driver]:
            raise EngineError("the tokens are not those of the engine that it takes turns with")
        seconds.append(took[driver])
        ratios.append(took[partner] / took[driver])
    return Timed(statistics.median(seconds), others_most, ratios, cpu)
