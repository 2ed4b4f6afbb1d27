"""Checks strict mode on a GPU, in a process of its own; prints `equal`, or what is not.

`linears`: rows of products, of the shapes of an 0.6B and an 8B model, are the same bits for any number of rows.
`requests FOLDER`: tokens and log-probabilities are, alone and in any batch, in any chunks.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise

import torch

from pawl_workers.kernels.triton.linear import StrictLinear
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.worker_driver import Generation, WorkerDriver

ROWS = [*range(1, 71), 100, 128, 200, 256, 512]
SHAPES = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (4096, 6144), (4096, 24576), (12288, 4096)]


def check_linears() -> list[str]:
    """Each number of rows against the largest."""
    different = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for inner, outer in SHAPES:
            weight = torch.randn(outer, inner, device="cuda", dtype=dtype) * 0.02
            x = torch.randn(max(ROWS), inner, device="cuda", dtype=dtype)
            linear = StrictLinear(weight, None)
            whole = linear(x)
            wrong = [rows for rows in ROWS if not torch.equal(linear(x[:rows]), whole[:rows])]
            if (whole - x @ weight.T).abs().max() > 0.05 * whole.abs().max():
                wrong.append(0)
            if wrong:
                different.append(f"{dtype} {inner}x{outer}: rows {wrong}")
    return different


def check_requests(folder: str) -> list[str]:
    """A needle alone, and beside others, and in chunks."""
    options = WorkerOptions(
        model=folder, device="cuda", dtype="bfloat16", kernels="triton", max_running=16, max_batch_tokens=4096,
        num_blocks=300, max_context=1024, strict=True,
    )  # fmt: skip
    driver = WorkerDriver(Worker.load(options))
    spec = SamplingSpec(temperature=0.0, logprobs=0)
    drawn = replace_temperature(spec)
    prompt = [random.Random(1).randrange(256) for _ in range(530)]

    def result(generation: Generation) -> list[tuple[int, float]]:
        return [(entry.token_id, entry.logprob) for entry in generation.logprobs if entry is not None]

    different = []
    for sampling in (spec, drawn):
        found = []
        for seed in range(12):
            chooser = random.Random(seed)
            needle = driver.start(prompt, sampling)
            others = [
                driver.start([chooser.randrange(256) for _ in range(chooser.randint(1, 300))], drawn)
                for _ in range(seed)
            ]
            driver.generate([needle, *others], 16, chunk=chooser.choice([1 << 30, 100, 64, 37]) if seed else 1 << 30)
            found.append(result(needle))
            for one in (needle, *others):
                driver.finish(one)
        different += [f"{sampling}: run {i + 1}" for i, (a, b) in enumerate(pairwise(found)) if a != b]
    return different


def replace_temperature(spec: SamplingSpec) -> SamplingSpec:
    """The same, drawn at temperature 1."""
    return SamplingSpec(temperature=1.0, logprobs=spec.logprobs, seed=5)


def main() -> int:
    """Run one part."""
    different = check_linears() if sys.argv[1] == "linears" else check_requests(sys.argv[2])
    sys.stdout.write("\n".join(different) or "equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
