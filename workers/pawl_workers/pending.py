"""Launched steps: done, or queued on a device with what they give on its way to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.batch import IntArray
from pawl_workers.plan import RowFailure, StepPlan, StepResult, TokenLogprobs
from pawl_workers.sampling.logprobs import TokenScores

__all__ = ["Arrival", "DoneStep", "PendingStep", "QueuedStep"]


class PendingStep(Protocol):
    """A launched step."""

    @property
    def future(self) -> Future[StepResult]:
        """Done once the step is settled, be it by `result` or by a launch that had to wait for it."""

    def wait(self) -> None:
        """Wait until `result` will not; the one method that other threads than the worker's may call."""

    def result(self) -> StepResult:
        """Settle this step and those before it, and return what it gave, or raise what it raised."""


class DoneStep:
    """A step that was computed when it was launched.

    Args:
        result: of it.
    """

    def __init__(self, result: StepResult) -> None:
        self._result = result

    @property
    def future(self) -> Future[StepResult]:
        """One that is done."""
        future: Future[StepResult] = Future()
        future.set_result(self._result)
        return future

    def wait(self) -> None:
        """Return at once."""

    def result(self) -> StepResult:
        """Return what the step gave."""
        return self._result


class Arrival:
    """What a step gave on its way to the host, into memory that is used again two steps later."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffers: list[Tensor] = []
        self._sent: list[Tensor] = []
        self._event = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies on the current stream."""
        self._sent = []
        for place, tensor in enumerate(tensors):
            buffer = self._buffers[place] if place < len(self._buffers) else None
            if buffer is None or buffer.dtype is not tensor.dtype or buffer.numel() < tensor.numel():
                buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=self._pinned)
                self._buffers[place : place + 1] = [buffer]
            self._sent.append(buffer[: tensor.numel()].view(tensor.shape).copy_(tensor, non_blocking=True))
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait for the copies."""
        if self._event is not None:
            self._event.synchronize()

    def read(self) -> list[NDArray[np.generic]]:
        """Return what was sent, in its order, once it is there; what is read is to be copied."""
        return [tensor.numpy() for tensor in self._sent]


@dataclass(slots=True)
class QueuedStep:
    """A step that is queued on the device.

    Attributes:
        rows: that compute, in the order of the plan, [R].
        num_tokens: of each, [R].
        sampling_rows: rows that sample, [S]; the i-th chosen id is that of the i-th.
        positions: where those ids will stand, [S].
        generations: of the sequence in each row of the table at the launch, [rows].
        chosen: the ids on the device, [S] int32.
        described: samples whose log-probabilities are wanted, [N].
        alternatives: best tokens to list with each, [N].
        arrival: brings ids; flags of finite tokens, unless all tokens sample; and the descriptions, if any.
        failures: rows of the plan that had failed before.
        settle: of the pipeline; settles this step and those before it.
        launched_at, prepared_at, arrived_at: seconds of `time.perf_counter`; the last is 0 until it is known.
    """

    plan: StepPlan
    rows: IntArray
    num_tokens: IntArray
    sampling_rows: IntArray
    positions: IntArray
    generations: IntArray
    chosen: Tensor
    described: IntArray
    alternatives: IntArray
    arrival: Arrival
    failures: list[RowFailure]
    settle: Callable[[QueuedStep], None]
    launched_at: float
    prepared_at: float
    arrived_at: float = 0.0
    future: Future[StepResult] = field(default_factory=Future)

    def wait(self) -> None:
        """Wait for the ids."""
        self.arrival.wait()
        self.arrived_at = self.arrived_at or time.perf_counter()

    def result(self) -> StepResult:
        """Settle this step and those before it, and return what it gave, or raise what it raised."""
        if not self.future.done():
            self.settle(self)
        return self.future.result()

    def entries(self, token_ids: IntArray, found: Sequence[NDArray[np.generic]]) -> list[TokenLogprobs | None]:
        """Give the log-probabilities of each sample, None where they are not wanted.

        Args:
            token_ids: of all samples, [S].
            found: the description, as it arrived.
        """
        logprobs, ranks, ids, alternatives = found
        scores = TokenScores(
            logprobs.astype(np.float32), ranks.astype(np.int64), ids.astype(np.int64), alternatives.astype(np.float32)
        )
        entries: list[TokenLogprobs | None] = [None] * len(token_ids)
        described = scores.entries(token_ids[self.described], self.alternatives)
        for sample, entry in zip(self.described.tolist(), described, strict=True):
            entries[sample] = entry
        return entries
