"""Parallelism inside a worker: the threads of one process. Imports no torch: its settings come before torch does."""

from __future__ import annotations

__all__ = ["set_num_threads", "thread_environment"]

_SPINS = 1000


def thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that keep the thread pools of a worker to its own cores. OpenMP reads them once, as torch is imported.

    What a step's threads do in turn, they wait for by themselves (`native/progress.c`); these settings are for the ends
    of parallel regions, of which a step has a few. A thread that sleeps at once has to be woken for the next one. One
    that spins for long loses more as soon as anything else runs on these cores: both threads come to wait on one of
    them, where the one that spins keeps the other from what it waits for. So a thread spins for about as long as an
    operation takes (`_SPINS` pauses of 24 to 50 ns), then sleeps.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "OPENBLAS_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": str(_SPINS),
        "TOKENIZERS_PARALLELISM": "false",
    }


def set_num_threads(num_threads: int) -> None:
    """Set torch's intra-op threads, whatever the environment says.

    Two OpenMP pools on the same cores starve each other, so a worker takes as many threads as it was told
    to and no more.
    """
    import torch  # noqa: PLC0415 (what is above is wanted before torch is imported)

    torch.set_num_threads(num_threads)
