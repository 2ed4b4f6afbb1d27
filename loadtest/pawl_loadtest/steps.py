"""`python -m pawl_loadtest.steps`: measure how long steps of many shapes take on a worker, for the simulator.

Runs decodes of R rows over a context, chunks of a prompt over a context, and mixtures of both, in random order, and
writes `seconds,tokens,contexts` per step. Then `python -m pawl_server.sim fit` makes a cost model of it. What is
written is the median of a few repeats. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pawl_loadtest.arguments import positive
from pawl_server.sim.measured import RecordedStep, write_steps
from pawl_workers.kernels.cpu_seconds import KernelSeconds
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan, StepResult
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["Driver", "Shape", "TimedStep", "draw_shapes", "main", "measure"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: tokens that each row computes, and the tokens that it holds before."""

    tokens: tuple[int, ...]
    before: tuple[int, ...]


def draw_shapes(count: int, *, max_running: int, max_batch_tokens: int, max_context: int, seed: int) -> list[Shape]:
    """Shapes over the whole range of a worker, rows and contexts drawn log-uniformly: decodes, chunks, mixtures."""
    draw = random.Random(seed)  # noqa: S311 (a sample, not a secret)

    def between(low: int, high: int) -> int:
        return min(high, round(low * math.exp(draw.random() * math.log(high / low))))

    shapes = []
    for number in range(count):
        num_decodes = between(1, max_running) if number % 3 != 1 else 0
        num_chunks = draw.randint(1, 3) if number % 3 and num_decodes < max_running else 0
        tokens = [1] * num_decodes
        for _ in range(min(num_chunks, max_running - num_decodes)):
            room = max_batch_tokens - sum(tokens)
            if room >= 2:
                tokens.append(between(2, min(room, max_context // 2)))
        shapes.append(Shape(tuple(tokens), tuple(between(1, max_context - new) for new in tokens)))
    return shapes


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step that was run: seconds in all, what the worker says of them, and what the clocks of its kernels do."""

    seconds: float
    result: StepResult
    kernels: KernelSeconds | None


class Driver:
    """Puts a worker into the state before a step, and times that step."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._epoch = 1

    def run(self, shape: Shape) -> TimedStep:
        """Run one step of this shape. Its rows are known to the worker by then, as they mostly are when it serves."""
        worker, size = self._worker, self._worker.facts.block_size
        self._epoch += 1
        worker.reset(self._epoch)
        new, next_block = [], 1
        for row, (count, before) in enumerate(zip(shape.tokens, shape.before, strict=True)):
            num_blocks = -(-(before + count) // size)
            blocks = list(range(next_block, next_block + num_blocks))
            next_block += num_blocks
            token_ids = [4 + (7 * row + 13 * place) % (worker.facts.vocab_size - 4) for place in range(before + count)]
            # The KV of `before - 1` tokens is said to be there: what stands in those blocks costs the same to read.
            new.append(NewSequence(row, token_ids, before + count, before - 1, blocks, SamplingSpec(temperature=0.0)))
        rows = list(range(len(new)))
        worker.execute(StepPlan(1, self._epoch, [], new, [], rows, [1] * len(rows)))
        plan = StepPlan(2, self._epoch, [], [], [], rows, list(shape.tokens))
        worker.take_kernel_seconds()
        started = time.perf_counter()
        result = worker.execute(plan)
        return TimedStep(time.perf_counter() - started, result, worker.take_kernel_seconds())


def measure(worker: Worker, shapes: Sequence[Shape], *, repeats: int = 3) -> list[RecordedStep]:
    """Time every shape, the median of some repeats."""
    driver = Driver(worker)
    for shape in shapes[:8]:
        driver.run(shape)
    steps = []
    for shape in shapes:
        seconds = statistics.median(driver.run(shape).seconds for _ in range(repeats))
        contexts = [count + before for count, before in zip(shape.tokens, shape.before, strict=True)]
        steps.append(RecordedStep(seconds=seconds, tokens=list(shape.tokens), contexts=contexts))
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.steps", description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="a folder, a hub id, or demo")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=positive, default=1)
    add("--max-running", type=positive, default=64, help="most rows of a step")
    add("--max-batch-tokens", type=positive, default=512, help="most tokens of a step")
    add("--max-context", type=positive, default=2048, help="longest sequence")
    add("--steps", type=positive, default=200, help="how many shapes")
    add("--repeats", type=positive, default=3, help="runs of each, of which the median counts")
    add("--seed", type=int, default=0, help="same seed, same shapes")
    add("--output", type=Path, required=True, help="CSV or JSON to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and return the exit code."""
    options = _parser().parse_args(arguments)
    block = 64  # no backend's blocks are larger
    worker = Worker.load(
        WorkerOptions(
            model=options.model, device=options.device, num_threads=options.threads, max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens, max_context=options.max_context,
            num_blocks=options.max_running * (-(-options.max_context // block) + 1) * 4,
        )
    )  # fmt: skip
    shapes = draw_shapes(
        options.steps, max_running=options.max_running, max_batch_tokens=options.max_batch_tokens,
        max_context=options.max_context, seed=options.seed,
    )  # fmt: skip
    write_steps(options.output, measure(worker, shapes, repeats=options.repeats))
    sys.stdout.write(
        f"{len(shapes)} steps on {worker.facts.device}, {worker.facts.kernels} kernels, {options.threads} threads\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
