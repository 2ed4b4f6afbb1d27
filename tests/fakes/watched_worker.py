"""Serves sequences by kernels that a test built: `python -m ... LIBRARY CHECKPOINT KV_DTYPE`; prints their tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch

from pawl_workers.kernels.native import build
from pawl_workers.kernels.native.library import load_library
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.worker_driver import WorkerDriver

__all__ = ["serve", "use"]


def use(built: Path) -> None:
    """Have all kernels of this process come from that library."""
    build.instruction_flags()  # asks for matrix tiles
    with patch("pawl_workers.kernels.native.library.find_or_build", lambda: built):
        load_library()  # which keeps it


def serve(checkpoint: str, kv_dtype: str, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts in chunks and decodes on two threads, greedy and sampled, with log-probabilities; the tokens of each."""
    draw = Random(1)
    worker = Worker.load(WorkerOptions(checkpoint, kernels="cpu", kv_dtype=kv_dtype, max_running=6, num_blocks=120))
    torch.set_num_threads(2)
    driver = WorkerDriver(worker)
    samplings = [SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.9, top_p=0.9, top_k=40, seed=3, logprobs=2)]
    generations = [
        driver.start(draw.choices(range(worker.facts.vocab_size), k=length), samplings[i % 2])
        for i, length in enumerate(lengths)
    ]
    driver.generate(generations[:1], 4, chunk=40)
    driver.generate(generations[::2], 4, chunk=250)  # the greedy ones by themselves
    driver.generate(generations, 6, chunk=250)
    return [generation.token_ids for generation in generations]


if __name__ == "__main__":
    use(Path(sys.argv[1]))
    print(serve(sys.argv[2], sys.argv[3], (1, 7, 40, 90, 600)))
