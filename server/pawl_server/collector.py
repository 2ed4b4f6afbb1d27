"""Python's cyclic garbage collector, kept away from what lives as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_at_rest", "leave_alone"]


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """For the start of a process: nothing is collected inside, and what is there at the end is never looked at again.

    Imports and loading make hundreds of thousands of objects that stay. The collector would walk over them several
    times while they are made, and for 80 ms whenever it does so later: as long as several decode steps.
    """
    gc.disable()
    try:
        yield
    finally:
        leave_alone()
        gc.enable()


def leave_alone() -> None:
    """Collect once; what is left is never looked at again."""
    gc.collect()
    gc.freeze()
