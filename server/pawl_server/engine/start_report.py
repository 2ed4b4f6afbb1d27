"""What is told of an engine's start: how far each part is, and what it found, to who started it and to the log.

Owns the words and the figures; what is done, and in which order, is the engine's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from pawl_server.engine.engine_worker import SelfTestReport, WorkerFacts
from pawl_server.engine.spec import EngineProgress
from pawl_server.scheduler.admission import SchedulerLimits

__all__ = ["LoadReport", "Progress", "Stage", "WarmUpReport", "report_memory", "report_self_test"]

log = logging.getLogger(__name__)

Progress = Callable[[EngineProgress], None]

_GIB = 1 << 30
_TELL_EVERY_S = 0.1  # a checkpoint may have thousands of tensors


class Stage:
    """One part of the start. Its seconds count from when this is made.

    Args:
        progress: told of it, from whichever thread tells.
        name: of the part.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._started = time.monotonic()

    def tell(self, text: str, done: int, total: int, counts: Mapping[str, int] | None = None) -> None:
        """Tell how far it is: `done` of `total`, 0 = nobody knows. The end is logged, too."""
        seconds = time.monotonic() - self._started
        if total and done == total:
            log.info("%s: %s (%.2f s)", self._name, text, seconds)
        self._progress(
            EngineProgress(
                step=self._name, done=done, total=total, text=text, seconds=seconds, facts=dict(counts or {})
            )
        )


class LoadReport:
    """Tells how far the worker is loaded."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._imports = Stage(progress, "imports")
        self._weights = Stage(progress, "weights")
        self._told = time.monotonic()

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """A `LoadProgress`, called on the worker's thread."""
        if phase == "imports":
            self._imports.tell("torch and the worker", done, total)
            self._weights = Stage(self._progress, "weights")
        elif phase == "weights" and done < total and time.monotonic() - self._told >= _TELL_EVERY_S:
            self._told = time.monotonic()
            self._weights.tell("", done, total)

    def loaded(self, facts: WorkerFacts, *, dummy_weights: bool) -> None:
        """Tell what was loaded."""
        text = (
            f"{facts.num_parameters / 1e6:.1f} M parameters in {facts.weight_type}, computed in {facts.data_type} on "
            f"{facts.device} by the {facts.kernels} kernels, KV in {facts.kv_type}"
        )
        if dummy_weights:
            text += ", RANDOM WEIGHTS"
        counts = {"weight_bytes": facts.weight_bytes, "num_parameters": facts.num_parameters}
        self._weights.tell(text, facts.weight_bytes, facts.weight_bytes, counts)


def report_memory(progress: Progress, facts: WorkerFacts, limits: SchedulerLimits) -> None:
    """Tell how the memory is divided, and how many tokens and requests that is room for."""
    cache_tokens = limits.pool_tokens
    text = (
        f"weights {facts.weight_bytes / _GIB:.2f} | activations {facts.activation_bytes / _GIB:.2f}"
        f" | KV {facts.kv_bytes / _GIB:.2f} GiB; KV cache {limits.num_blocks} blocks x {limits.block_size}"
        f" = {cache_tokens} tokens: {cache_tokens // limits.max_context} requests of {limits.max_context}"
    )
    counts = {
        "weight_bytes": facts.weight_bytes,
        "activation_bytes": facts.activation_bytes,
        "kv_bytes": facts.kv_bytes,
        "num_blocks": limits.num_blocks,
        "num_host_blocks": facts.num_host_blocks,
        "block_size": limits.block_size,
        "cache_tokens": cache_tokens,
        "max_context": limits.max_context,
        "max_concurrency": cache_tokens // limits.max_context,
    }
    Stage(progress, "memory").tell(text, 1, 1, counts)


class WarmUpReport:
    """Tells of the warm-up, whose number of steps is known when it is over."""

    def __init__(self, progress: Progress) -> None:
        self._stage = Stage(progress, "warm-up")
        self._num_steps = 0

    def on_step(self, done: int, num_tokens: int) -> None:
        """So many steps are done, the last one of so many tokens."""
        self._num_steps = done
        self._stage.tell(f"step {done}: {num_tokens} tokens", done, 0)

    def done(self, largest: int, widest: int) -> None:
        """Tell of how many tokens and of how many sequences a step was at most."""
        counts = {"num_tokens": largest, "num_sequences": widest}
        text = f"prefill {largest} tokens, decode batch {widest}"
        self._stage.tell(text, self._num_steps, self._num_steps, counts)


def report_self_test(stage: Stage, report: SelfTestReport) -> None:
    """Tell what a passed self-test found."""
    text = f"{report.num_tokens} tokens, log-probabilities within {report.max_difference:.1e} of the reference"
    stage.tell(text, report.num_tokens, report.num_tokens)
