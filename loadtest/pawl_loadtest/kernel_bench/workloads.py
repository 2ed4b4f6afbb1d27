"""The workloads of the peers' comparison, in process, with and without a look at each step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pawl_loadtest.kernel_bench.limits import limits_of_step
from pawl_loadtest.kernel_bench.split import Phase, WatchedStep, parts_of, phases_of
from pawl_loadtest.peers.bounds import MachineLimits
from pawl_loadtest.peers.in_process import InProcess
from pawl_loadtest.peers.others import others_cores
from pawl_loadtest.peers.shapes import Shape as ModelShape
from pawl_loadtest.peers.workloads import Workload
from pawl_loadtest.steps import Shape
from pawl_workers.facts import WorkerFacts
from pawl_workers.pending import PendingStep
from pawl_workers.plan import StepPlan
from pawl_workers.worker import Worker

__all__ = ["Cost", "TimedRun", "Watch", "run_workload"]

_WARM_UP_TOKENS = 2


class Watch:
    """Stands before a worker whose kernels count, and notes each step."""

    def __init__(self, worker: Worker) -> None:
        self.facts: WorkerFacts = worker.facts
        self.steps: list[WatchedStep] = []
        self._worker = worker
        self._computed: dict[int, int] = {}
        worker.take_kernel_seconds()
        self._last = time.perf_counter()

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run a step, and wait for it.

        Raises:
            RuntimeError: the worker's kernels have no clocks.
        """
        told = time.perf_counter()
        pending = self._worker.launch(plan)
        result = pending.result()
        ended = time.perf_counter()
        kernels = self._worker.take_kernel_seconds()
        if kernels is None:
            raise RuntimeError(f"kernels {self.facts.kernels!r} have no clocks; must be cpu")
        self._computed |= {new.row: new.num_computed for new in plan.new}
        before = tuple(self._computed[row] for row in plan.rows)
        self._computed |= {row: done + new for row, done, new in zip(plan.rows, before, plan.num_tokens, strict=True)}
        shape = Shape(tuple(plan.num_tokens), before)
        self.steps.append(WatchedStep(shape, ended - self._last, told - self._last, result, kernels))
        self._last = ended
        return pending


@dataclass(frozen=True, slots=True)
class Cost:
    """What limits are worked out with; `weight_bytes` are those of one weight, as it is packed."""

    model: ModelShape
    weight_bytes: float
    kv_bytes: int
    can: MachineLimits

    def of(self, step: Shape, num_samples: int) -> dict[str, float]:
        """Least seconds of a step by part."""
        return limits_of_step(self.model, step, self.weight_bytes, self.kv_bytes, self.can, num_samples)


@dataclass(frozen=True, slots=True)
class TimedRun:
    """A workload, run a few times.

    Attributes:
        plain_s: seconds of each run that nobody watched, and `watched_s` of each that was.
        others: cores that others took meanwhile, the most of all runs.
        steps: of the watched run in the middle.
    """

    workload: Workload
    plain_s: Sequence[float]
    watched_s: Sequence[float]
    others: float
    steps: Sequence[WatchedStep]

    def phases(self, cost: Cost) -> list[Phase]:
        """Its steps by phase, held to their limits."""
        return phases_of(self.steps, [cost.of(step.shape, len(step.result.token_ids)) for step in self.steps])

    @property
    def accounted(self) -> float:
        """The sum of all parts of all steps over the seconds that the same took without a watch, the median."""
        return sum(sum(parts_of(step).values()) for step in self.steps) / statistics.median(self.plain_s)


def run_workload(engine: InProcess, workload: Workload, rounds: int) -> TimedRun:
    """Run it unwatched and watched in turns, the same prompts."""
    prompts = workload.prompts(engine.facts.vocab_size, seed=10)
    engine.run([prompt[: 2 * _WARM_UP_TOKENS] for prompt in prompts], _WARM_UP_TOKENS)
    plain: list[float] = []
    watched: list[tuple[float, Watch]] = []
    others = 0.0
    for number in range(2 * rounds):
        watches = number % 4 in {1, 2}  # neither is always the first
        started = time.perf_counter()
        watch = Watch(engine.worker) if watches else None
        with others_cores() as beside:
            engine.run(prompts, workload.output_tokens, through=watch)
        others = max(others, beside.cores)
        seconds = time.perf_counter() - started
        if watch is None:
            plain.append(seconds)
        else:
            watched.append((seconds, watch))
    watched.sort(key=lambda run: run[0])
    steps = watched[len(watched) // 2][1].steps
    return TimedRun(workload, plain, [seconds for seconds, _ in watched], others, steps)
