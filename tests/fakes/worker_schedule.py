"""Serves requests on a worker as some scheduler might: late arrivals, any grants, preemptions, blocks lent, threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from pawl_workers.plan import SamplingSpec, TokenLogprobs
from tests.fakes.worker_driver import Generation, WorkerDriver

__all__ = ["Outcome", "Request", "WorkerSchedule", "draw_requests", "serve_alone"]

_NUM_ALTERNATIVES = 2
_GRANTS = (1, 1, 1, 2, 7, 31, 33, 64, 90)


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be generated."""

    prompt: list[int]
    sampling: SamplingSpec
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request gave, as tensors.

    Attributes:
        token_ids: int64 [N].
        logprobs: of each token and of the best beside it, float64 [N, 1 + alternatives], as float32 gave them.
        prompt: position, log-probability, rank, and the best beside it, of prompt tokens, in the order they were
            reported: some may be missing (over a cached prefix) or come twice (after a preemption).
    """

    token_ids: Tensor
    logprobs: Tensor
    prompt: list[tuple[int, list[float]]]

    def equals(self, alone: Outcome) -> bool:
        """Whether tokens and all log-probabilities have the bits that a request has alone."""
        wanted = dict(alone.prompt)
        return (
            torch.equal(self.token_ids, alone.token_ids)
            and torch.equal(self.logprobs, alone.logprobs)
            and all(found == wanted[position] for position, found in self.prompt)
        )


def draw_requests(chooser: Random, vocab_size: int, most: int) -> list[Request]:
    """Draw two or more requests, from one token to three tiles; most begin alike, half are sampled."""
    shared = chooser.choices(range(vocab_size), k=70)
    requests = []
    for seed in range(chooser.randint(2, most)):
        own = chooser.choices(range(vocab_size), k=chooser.choice([1, 4, 31, 64, 65, 90]))
        prompt = shared[: chooser.choice([0, 33, 64, 70])] + own
        sampling = SamplingSpec(temperature=0.0, logprobs=_NUM_ALTERNATIVES)
        if chooser.random() < 0.5:
            sampling = SamplingSpec(
                temperature=0.9, top_k=chooser.choice([0, 20]), top_p=0.95, min_p=0.01, seed=seed,
                presence_penalty=0.4, repetition_penalty=1.1, logprobs=_NUM_ALTERNATIVES,
            )  # fmt: skip
        requests.append(Request(prompt, sampling, chooser.randint(1, 12)))
    return requests


def serve_alone(driver: WorkerDriver, requests: Sequence[Request]) -> list[Outcome]:
    """Serve each request by itself: its prompt in one step, with one thread."""
    torch.set_num_threads(1)
    outcomes = []
    for request in requests:
        generation = driver.start(request.prompt, request.sampling, prompt_logprobs=_NUM_ALTERNATIVES)
        driver.generate([generation], request.num_tokens)
        driver.finish(generation)
        outcomes.append(_outcome(generation))
    return outcomes


@dataclass(slots=True)
class WorkerSchedule:
    """One drawn schedule of some requests; `run` serves them and frees what they held."""

    driver: WorkerDriver
    chooser: Random
    requests: Sequence[Request]
    generations: dict[int, Generation] = field(default_factory=dict)  # by the number of the request
    num_preempted: int = 0
    num_over_prefix: int = 0
    num_together: int = 0  # steps of more than one sequence

    def run(self) -> list[Outcome]:
        """Serve all requests and return their outcomes."""
        waiting = list(range(len(self.requests)))
        while waiting or self._running():
            if waiting and self.chooser.random() < 0.6:
                self._arrive(waiting.pop(0))
            running = self._running()
            if not running:
                continue
            if self.chooser.random() < 0.15:
                self._preempt(self.chooser.choice(running))
            chosen = self.chooser.sample(running, self.chooser.randint(1, len(running)))
            self.num_together += len(chosen) > 1
            torch.set_num_threads(self.chooser.choice([1, 2]))
            self.driver.step(
                [(one, min(len(one.token_ids) - one.num_computed, self.chooser.choice(_GRANTS))) for one in chosen]
            )
        for generation in self.generations.values():
            self.driver.finish(generation)
        return [_outcome(self.generations[number]) for number in range(len(self.requests))]

    def _running(self) -> list[Generation]:
        return [one for number, one in self.generations.items() if len(one.output) < self.requests[number].num_tokens]

    def _arrive(self, number: int) -> None:
        """Begin a request, over the full blocks that another one has computed of the tokens they share."""
        request = self.requests[number]
        size = self.driver.worker.facts.block_size
        cached: list[int] = []
        for lender in self.generations.values():
            alike = _num_alike(request.prompt, lender.token_ids)
            full = min(alike, lender.num_computed, len(request.prompt) - 1) // size
            cached = max(cached, lender.blocks[:full], key=len)
        self.num_over_prefix += bool(cached)
        self.generations[number] = self.driver.start(
            request.prompt, request.sampling, prompt_logprobs=_NUM_ALTERNATIVES, cached=cached
        )

    def _preempt(self, generation: Generation) -> None:
        """Free a sequence, of whose full blocks some may still be cached when it is sent again."""
        full = min(generation.num_computed, len(generation.token_ids) - 1) // self.driver.worker.facts.block_size
        self.driver.preempt(generation, keep=self.chooser.randint(0, full))
        self.num_preempted += 1


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _outcome(generation: Generation) -> Outcome:
    entries = [entry for entry in generation.logprobs if entry is not None]
    prompt = [
        (part.first_position + i, _numbers(entry))
        for part in generation.prompt
        for i, entry in enumerate(part.positions)
    ]
    return Outcome(
        torch.tensor(generation.output),
        torch.tensor([[entry.logprob, *entry.alternative_logprobs] for entry in entries], dtype=torch.float64),
        prompt,
    )


def _numbers(entry: TokenLogprobs) -> list[float]:
    return [entry.logprob, entry.rank, *entry.alternative_ids, *entry.alternative_logprobs]
