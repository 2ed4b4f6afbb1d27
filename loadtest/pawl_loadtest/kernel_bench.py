"""`python -m pawl_loadtest.kernel_bench`: where a step's time goes on a CPU, and how near its parts come to the limit.

Makes a checkpoint of a named shape with random weights, and measures two things with a worker's own kernels: each
linear layer of the shape at several numbers of rows, and whole steps, split into linears, attention, norms with the
placing of keys and values, the head with the final norm, sampling, the preparing of the batch, and the rest, which is
Python. Beside each stands the fraction of its limit: the bytes that it has to read or the operations that it has to
do, whichever takes longer at what the machine was measured to do in the instructions that the kernels use (see
PAWL_CPU_INSTRUCTIONS): matrix tiles for linear layers where there are any, registers for attention. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.bounds import MachineLimits
from pawl_loadtest.peers.checkpoint import WEIGHTS, make_checkpoint
from pawl_loadtest.peers.machine import instructions, measure_machine
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.shapes import Shape as ModelShape
from pawl_loadtest.steps import Driver, Shape, TimedStep
from pawl_workers.batch import AttentionShape
from pawl_workers.kernels import Kernels, choose_backend
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["limits_of_step", "main", "parse_step", "split"]

_STEPS = ("1x1@32", "16x1@192", "16x1@640", "64x1@160", "1x512@1")
_ROWS = (1, 4, 16, 64, 512)
_LEAST_BLOCK = 16  # tokens of the smallest KV block of any kernels
_SET_BYTES = 64 << 20  # weights that a linear is measured over, so that they come from memory as in a step
_KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_STEP = re.compile(r"(\d+)x(\d+)@(\d+)")


def parse_step(text: str) -> Shape:
    """A step written as ROWSxTOKENS@BEFORE: so many rows that each compute so many tokens after so many.

    Raises:
        argparse.ArgumentTypeError: it is not written so, or one of the numbers is 0.
    """
    found = _STEP.fullmatch(text)
    rows, tokens, before = map(int, found.groups()) if found else (0, 0, 0)
    if not (rows and tokens and before):
        raise argparse.ArgumentTypeError(f"{text!r}: must be ROWSxTOKENS@BEFORE, each above 0, such as 16x1@192")
    return Shape((tokens,) * rows, (before,) * rows)


def split(step: TimedStep) -> dict[str, float]:
    """Seconds of a step by part; they add up to the whole."""
    layers, result = step.layers, step.result
    parts = {"linears": 0.0, "attention": 0.0, "norms and placing": 0.0}
    if layers is not None:
        parts |= {
            "linears": layers.linears,
            "attention": layers.attention,
            "norms and placing": layers.norms + layers.placing,
        }
    head = result.forward_s - sum(parts.values())
    parts |= {"head": head, "sampling": result.sample_s, "preparing": result.prepare_s}
    return parts | {"rest": step.seconds - sum(parts.values())}


def limits_of_step(
    model: ModelShape, step: Shape, weight_bytes: int, kv_bytes: int, can: MachineLimits
) -> dict[str, float]:
    """Least seconds of a step's parts that bytes or operations bound; every row samples one token."""

    def least(num_bytes: float, operations: float, flops: float) -> float:
        return max(num_bytes / can.read_bytes, operations / flops)

    pairs = sum(new * before + new * (new + 1) // 2 for new, before in zip(step.tokens, step.before, strict=True))
    contexts = sum(step.tokens) + sum(step.before)
    layer, head = model.layer_weights, model.head_weights
    return {
        "linears": least(layer * weight_bytes, 2 * layer * sum(step.tokens), can.flops),
        "attention": least(
            contexts * model.kv_per_token * kv_bytes, pairs * model.attention_per_pair, can.attention_flops
        ),
        "head": least(head * weight_bytes, 2 * head * len(step.tokens), can.flops),
    }


def _linears(model: ModelShape) -> Mapping[str, tuple[int, int]]:
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "queries, keys, values": (model.hidden_size, queries + 2 * keys),
        "attention output": (queries, model.hidden_size),
        "gate and up": (model.hidden_size, 2 * model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
        "head": (model.hidden_size, model.vocab_size),
    }


def _report_linears(
    kernels: Kernels, model: ModelShape, rows: Sequence[int], dtype: torch.dtype, can: MachineLimits
) -> None:
    for name, (inner, outer) in _linears(model).items():
        num_bytes = inner * outer * dtype.itemsize
        weights = [(torch.randn(outer, inner) * 0.02).to(dtype) for _ in range(max(1, _SET_BYTES // num_bytes))]
        packed = [kernels.pack_linear(weight, None) for weight in weights]
        del weights
        _write(f"{name} [{inner}, {outer}]")
        for count in rows:
            x = torch.randn(count, inner)

            def run(x: torch.Tensor = x, packed: Sequence[Callable[[torch.Tensor], torch.Tensor]] = packed) -> None:
                for linear in packed:
                    linear(x)

            best, middle = _times(run)
            best, middle = best / len(packed), middle / len(packed)
            operations = 2 * count * inner * outer
            limit = max(num_bytes / can.read_bytes, operations / can.flops)
            _write(
                f"  {count:4} rows: {middle * 1e6:9.0f} us, best {best * 1e6:9.0f}: {operations / best / 1e9:6.0f} "
                f"GFLOP/s, {num_bytes / best / 1e9:5.1f} GB/s, {limit / best:4.0%} of the limit"
            )


def _times(run: Callable[[], object], *, least_s: float = 0.3, least_runs: int = 5) -> tuple[float, float]:
    """Best and median seconds."""
    run()
    times: list[float] = []
    while sum(times) < least_s or len(times) < least_runs:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times), statistics.median(times)


def _report_step(driver: Driver, step: Shape, limits: Mapping[str, float], repeats: int) -> None:
    driver.run(step)
    runs = sorted((driver.run(step) for _ in range(repeats)), key=lambda timed: timed.seconds)
    middle = runs[len(runs) // 2]
    _write(
        f"{len(step.tokens)} x {step.tokens[0]} after {step.before[0]}: {middle.seconds * 1e3:.1f} ms "
        f"({runs[0].seconds * 1e3:.1f} to {runs[-1].seconds * 1e3:.1f}), "
        f"{sum(limits.values()) / middle.seconds:.0%} of the limit"
    )
    for name, seconds in split(middle).items():
        fraction = f", {limits[name] / seconds:4.0%} of its limit" if name in limits else ""
        _write(f"  {name:18} {seconds * 1e3:8.2f} ms, {seconds / middle.seconds:4.0%} of the step{fraction}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.kernel_bench", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="smollm2-135m", help="sizes of the model")
    add("--weights", choices=sorted(WEIGHTS), default="bfloat16", help="what the checkpoint's weights are exact in")
    add("--kv-dtype", choices=sorted(_KV_BYTES), default="float32")
    add("--kernels", default="cpu", help="cpu, onednn or reference; the split of layers is that of cpu")
    add("--threads", type=positive, default=2)
    add(
        "--steps",
        type=parse_step,
        nargs="*",
        default=[parse_step(text) for text in _STEPS],
        metavar="ROWSxTOKENS@BEFORE",
    )
    add("--rows", type=positive, nargs="*", default=list(_ROWS), help="of the linears; none leaves them out")
    add("--repeats", type=positive, default=9, help="runs of each step, of which the median counts")
    add("--folder", type=Path, help="where checkpoints are kept; default: a temporary folder")
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
            kernels=options.kernels,
            kv_dtype=options.kv_dtype,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            max_context=max_context,
            num_blocks=max(rows * (-(-context // _LEAST_BLOCK)) for rows, _, context in sizes) + 1,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _parser().parse_args(arguments)
    model, dtype = SHAPES[options.shape], WEIGHTS[options.weights]
    weight_bytes = (model.layer_weights + model.head_weights) * dtype.itemsize
    machine = measure_machine(options.threads, weight_bytes, quick=options.quick)
    peak = instructions(options.weights)
    can = machine.limits(peak)
    for line in (*machine.lines(), f"limits are those of {peak}"):
        _write(line)
    with tempfile.TemporaryDirectory(prefix="pawl-kernels-") as folder:
        checkpoint = make_checkpoint(model, options.folder or Path(folder), weights=options.weights)
        worker = _load(options, checkpoint)
    shape = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim)
    with torch.inference_mode():
        kernels = choose_backend(torch.device("cpu"), torch.float32, shape, options.kernels)
        _report_linears(kernels, model, options.rows, dtype, can)
    driver = Driver(worker)
    for step in options.steps:
        limits = limits_of_step(model, step, dtype.itemsize, _KV_BYTES[options.kv_dtype], can)
        _report_step(driver, step, limits, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
