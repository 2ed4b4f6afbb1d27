"""Measure pawl on one GPU: 256 requests on Qwen3-0.6B shapes, and a single stream on 8B shapes.

On demand (`--cases routed routed-single`) both on eight layers of Qwen3-30B-A3B, whose MLPs are routed. Their bound
counts the experts that a step's rows choose, from how often each was chosen in the check of the outputs.

Weights are random, of the true shapes. First the machine's read bandwidth and matrix peak are measured; outputs are
checked against transformers before anything is timed; then pawl and transformers' continuous batching take turns. Run
it on a GPU that nothing else uses.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pawl_loadtest.arguments import positive
from pawl_loadtest.gpu_bench.bounds import GpuLimits, byte_bound
from pawl_loadtest.gpu_bench.checkpoint import make_gpu_checkpoint
from pawl_loadtest.gpu_bench.engines import Checked, Pawl, Transformers
from pawl_loadtest.gpu_bench.machine import describe_gpu, measure_gpu
from pawl_loadtest.gpu_bench.report import Row, table
from pawl_loadtest.gpu_bench.shapes import GPU_SHAPES, RoutedShape
from pawl_loadtest.gpu_bench.workload import Request, describe, mixed_requests, shortened, single_stream

_TOLERANCE = 6
"""Steps of bf16 between a chosen token's logit and the best: models of bf16 differ by some, wrong ones by hundreds."""

_ROUTED_TOLERANCE = 16
"""The same where experts of nearly equal shares change places by rounding."""

_STANDING = {"mixed": "qwen3-0.6b", "single": "qwen3-8b"}
_CASES = {**_STANDING, "routed": "qwen3-30b-a3b-8", "routed-single": "qwen3-30b-a3b-8"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit code 2 without a GPU, 1 when outputs disagree."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.gpu_bench", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=_CASES, default=list(_STANDING))
    parser.add_argument("--shape", choices=GPU_SHAPES, help="instead of each case's own")
    parser.add_argument("--requests", type=positive, default=256, help="of the mixed workload; 256 is the standing one")
    parser.add_argument(
        "--most-output", type=positive, help="tokens; cuts the mixed workload's, over which transformers take minutes"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--strict", action="store_true", help="pawl in strict mode")
    parser.add_argument("--no-peer", action="store_true", help="check outputs, but do not time transformers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("gpu_bench: this torch finds no CUDA device; there is nothing to measure\n")
        return 2
    limits, rows = None, []
    with tempfile.TemporaryDirectory(prefix="pawl-gpu-bench-") as folder:
        for case in options.cases:
            row, limits = _measure(case, options, Path(folder), limits)
            rows.append(row)
            sys.stderr.write(table([row]))
    facts = describe_gpu() | {"weights": "random, bf16", "kv": "bf16", "strict": str(options.strict)}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    if limits is not None:
        sys.stdout.write(
            f"measured: read {limits.read_bytes / 1e12:.2f} TB/s, bf16 product {limits.flops / 1e12:.0f} TFLOP/s\n"
        )
    sys.stdout.write(table(rows))
    if options.json:
        figures = {
            "facts": facts,
            "limits": None if limits is None else asdict(limits),
            "rows": list(map(asdict, rows)),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    wrong = [row for row in rows if row.worst_margin > _tolerance(row)]
    for row in wrong:
        sys.stderr.write(
            f"gpu_bench: on {row.shape} a chosen token's logit is {row.worst_margin:.0f} steps of bf16 below the best "
            f"of transformers, more than {_tolerance(row)}\n"
        )
    return 1 if wrong else 0


def _measure(case: str, options: argparse.Namespace, folder: Path, limits: GpuLimits | None) -> tuple[Row, GpuLimits]:
    shape = GPU_SHAPES[options.shape or _CASES[case]]
    is_single = case.endswith("single")
    requests = single_stream() if is_single else mixed_requests(options.requests, options.most_output)
    workload = describe(requests)
    checkpoint = make_gpu_checkpoint(shape, folder)
    pawl = Pawl(checkpoint, requests, strict=options.strict)
    limits = limits or measure_gpu()
    peer = Transformers(checkpoint)
    checked = _verify(pawl, peer, requests)
    bound = byte_bound(shape, requests, limits, frequencies=checked.frequencies())
    row = Row(shape.name, workload, bound.tokens_per_s(requests), asdict(bound))
    row.worst_margin = max(checked.margins)
    if row.worst_margin <= _tolerance(row):
        engines: list[Pawl | Transformers] = [pawl] if options.no_peer else [pawl, peer]
        for engine in engines:
            row.rates[engine.name] = []
            engine.warm_up(requests)
        for number in range(options.rounds):
            for engine in engines if number % 2 == 0 else reversed(engines):
                outcome = engine.run(requests)
                if [len(ids) for ids in outcome.token_ids] != [one.output_tokens for one in requests]:
                    raise RuntimeError(f"{engine.name} generated other lengths than asked for")
                row.rates[engine.name].append(outcome.tokens_per_s)
                sys.stderr.write(f"round {number + 1}, {engine.name}: {outcome.tokens_per_s:.0f} tokens/s\n")
    del pawl, peer
    gc.collect()
    torch.cuda.empty_cache()
    return row, limits


def _tolerance(row: Row) -> int:
    return _ROUTED_TOLERANCE if isinstance(GPU_SHAPES[row.shape], RoutedShape) else _TOLERANCE


def _verify(pawl: Pawl, peer: Transformers, requests: Sequence[Request]) -> Checked:
    """Compare pawl's greedy tokens with the best of transformers, over some shortened requests."""
    few = shortened(requests[:8], 200, 32)
    return peer.check(few, pawl.run(few).token_ids)


if __name__ == "__main__":
    sys.exit(main())
