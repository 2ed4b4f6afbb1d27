"""`python -m pawl_loadtest.kernel_bench`: where a step's time goes on a CPU, and how near its parts come to the limit.

Makes a checkpoint of a named shape with random weights, and measures three things with pawl's own kernels: each linear
layer of the shape at several numbers of rows; single steps; and whole workloads under the production scheduler, once
unwatched and once with every step parted into linears, attention, norms with rope and the placing of keys and values,
the head, sampling, waits for other threads, and Python: planning, preparing the batch, dispatch. Each part has a clock
of its own, so that it shows how much of the step they add up to. Beside each stands the fraction of its limit: the
bytes that it has to read or the operations that it has to do, whichever takes longer at what the machine was measured
to do in the instructions that the kernels use (see PAWL_CPU_INSTRUCTIONS): matrix tiles for linear layers where there
are any, registers for attention. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pawl_loadtest.arguments import positive
from pawl_loadtest.kernel_bench.linears import LinearTime, bytes_per_weight, measure_linears
from pawl_loadtest.kernel_bench.report import as_json, phase_lines, run_lines
from pawl_loadtest.kernel_bench.single import parse_step, run_steps
from pawl_loadtest.kernel_bench.split import Phase, WatchedStep, phases_of
from pawl_loadtest.kernel_bench.workloads import Cost, TimedRun, run_workload
from pawl_loadtest.peers.checkpoint import WEIGHTS, make_checkpoint
from pawl_loadtest.peers.in_process import InProcess
from pawl_loadtest.peers.machine import instructions, measure_machine
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.shapes import Shape as ModelShape
from pawl_loadtest.peers.workloads import NAMED, Workload, parse_workloads
from pawl_loadtest.steps import Driver, Shape
from pawl_workers.batch import AttentionShape
from pawl_workers.kernels import choose_backend
from pawl_workers.parallel import thread_environment
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["main"]

_STEPS = ("1x1@32", "16x1@192", "16x1@640", "64x1@160", "1x512@1")
_ROWS = (1, 4, 16, 64, 512)
_LEAST_BLOCK = 16  # tokens of the smallest KV block of any kernels
_KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def _write(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.kernel_bench", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="smollm2-135m", help="sizes of the model")
    add("--weights", choices=sorted(WEIGHTS), default="bfloat16", help="what the checkpoint's weights are exact in")
    add("--kv-dtype", choices=sorted(_KV_BYTES), default="float32")
    add("--threads", type=positive, default=2)
    add("--rows", type=positive, nargs="*", default=list(_ROWS), help="of the linears; none leaves them out")
    add("--steps", type=parse_step, nargs="*", default=list(map(parse_step, _STEPS)), metavar="ROWSxTOKENS@BEFORE")
    add("--repeats", type=positive, default=9, help="runs of each step, of which the median counts")
    add("--workloads", nargs="*", default=list(NAMED), help=f"{', '.join(NAMED)}, or REQUESTSxPROMPT/OUTPUT")
    add("--rounds", type=positive, default=1, help="of each workload, without a watch and with one")
    add("--folder", type=Path, help="where checkpoints are kept; default: a temporary folder")
    add("--json", type=Path, help="write every figure here")
    add("--quick", action="store_true", help="measure the machine on 128 MiB alone")
    return parser


def _load(options: argparse.Namespace, checkpoint: Path) -> Worker:
    steps: list[Shape] = options.steps
    sizes = [(len(step.tokens), sum(step.tokens), step.tokens[0] + step.before[0]) for step in steps]
    max_running, max_batch_tokens, max_context = map(max, zip(*sizes, strict=True))
    return Worker.load(
        WorkerOptions(
            model=str(checkpoint),
            num_threads=options.threads,
            kernels="cpu",
            kv_dtype=options.kv_dtype,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            max_context=max_context,
            num_blocks=max(rows * (-(-context // _LEAST_BLOCK)) for rows, _, context in sizes) + 1,
        )
    )


def _measure_linears(options: argparse.Namespace, model: ModelShape) -> tuple[list[LinearTime], float]:
    """Linear layers, and bytes of a weight as they are packed."""
    shape, dtype = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim), WEIGHTS[options.weights]
    with torch.inference_mode():
        kernels = choose_backend(torch.device("cpu"), torch.float32, shape, "cpu")
        return measure_linears(kernels, model, options.rows, dtype), bytes_per_weight(kernels, dtype)


def _measure_steps(options: argparse.Namespace, checkpoint: Path) -> list[list[WatchedStep]]:
    driver = Driver(_load(options, checkpoint)) if options.steps else None
    return [run_steps(driver, step, options.repeats) for step in options.steps if driver is not None]


def _measure_workloads(options: argparse.Namespace, checkpoint: Path, workloads: list[Workload]) -> list[TimedRun]:
    if not workloads:
        return []
    settings = {"kernels": "cpu", "kv_dtype": options.kv_dtype}
    engine = InProcess(str(checkpoint), options.threads, workloads, settings)
    return [run_workload(engine, workload, options.rounds) for workload in workloads]


def _print(cost: Cost, linears: list[LinearTime], steps: list[list[WatchedStep]], runs: list[TimedRun]) -> None:
    for name, times in itertools.groupby(linears, key=lambda time: f"{time.name} [{time.inner}, {time.outer}]"):
        _write(name, *(time.line(cost.can) for time in times))
    for repeated in steps:
        low, high = repeated[0].seconds * 1e3, repeated[-1].seconds * 1e3
        _write(f"{_name(repeated[0])}: {low:.1f} to {high:.1f} ms", *phase_lines(_phase(repeated, cost)))
    for run in runs:
        _write(*run_lines(run, cost))


def _name(step: WatchedStep) -> str:
    return f"{len(step.shape.tokens)} x {step.shape.tokens[0]} after {step.shape.before[0]}"


def _phase(repeated: Sequence[WatchedStep], cost: Cost) -> Phase:
    middle = repeated[len(repeated) // 2]
    return phases_of([middle], [cost.of(middle.shape, len(middle.shape.tokens))])[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code, 2 for usage."""
    options = _parser().parse_args(arguments)
    try:
        workloads = parse_workloads(options.workloads)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    model = SHAPES[options.shape]
    weights = (model.layer_weights + model.head_weights) * WEIGHTS[options.weights].itemsize
    before = measure_machine(options.threads, weights, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="pawl-kernels-") as folder:
        checkpoint = make_checkpoint(model, options.folder or Path(folder), weights=options.weights)
        linears, weight_bytes = _measure_linears(options, model)
        steps = _measure_steps(options, checkpoint)
        runs = _measure_workloads(options, checkpoint, workloads)
    machine = before.better(measure_machine(options.threads, weights, quick=options.quick))
    peak = instructions(options.weights)
    cost = Cost(model, weight_bytes, _KV_BYTES[options.kv_dtype], machine.limits(peak))
    _write(*machine.lines(), f"the better of before and after; limits are those of {peak}")
    _write(f"a weight is packed in {weight_bytes:.2f} bytes, which limits count")
    _print(cost, linears, steps, runs)
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        named = {_name(repeated[0]): _phase(repeated, cost) for repeated in steps}
        options.json.write_text(as_json(machine, settings, cost, linears, named, runs), encoding="utf-8")
    return 0


def _begin() -> int:
    """With OpenMP's settings as a server's engine has them: they are read once, as torch is imported."""
    settings = thread_environment(_parser().parse_args().threads)
    if any(os.environ.get(name) != value for name, value in settings.items()):
        command = [sys.executable, "-m", "pawl_loadtest.kernel_bench", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | settings)  # noqa: S606 (this very program)
    return main()


if __name__ == "__main__":
    sys.exit(_begin())
