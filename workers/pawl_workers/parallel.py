"""Parallelism inside a worker: for now the number of threads of one process."""

from __future__ import annotations

import torch

__all__ = ["set_num_threads"]


def set_num_threads(num_threads: int) -> None:
    """Set torch's intra-op threads, whatever the environment says.

    Two OpenMP pools on the same cores starve each other, so a worker takes as many threads as it was told
    to and no more.
    """
    torch.set_num_threads(num_threads)
