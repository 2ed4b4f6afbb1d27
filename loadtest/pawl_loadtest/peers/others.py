"""How much of the machine others took while an engine was timed: what makes a figure worse than it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

__all__ = ["Others", "others_cores"]


@dataclass(slots=True)
class Others:
    """Cores kept busy by neither the engine's processes nor this one, on the average."""

    cores: float = 0.0


@contextmanager
def others_cores(process_id: int | None = None) -> Iterator[Others]:
    """Measure over the body.

    Time that the machine's host gave to other machines counts, too. A process of the engine that ends meanwhile counts
    as another's.

    Args:
        process_id: of the engine; the processes that it has started belong to it. None: it is this process.
    """
    others = Others()
    busy, own, started = _busy_s(), _own_s(process_id), time.monotonic()
    yield others
    seconds = time.monotonic() - started
    foreign = (_busy_s() - busy) - (_own_s(process_id) - own)
    others.cores = max(0.0, foreign / seconds) if seconds > 0 else 0.0


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _own_s(process_id: int | None) -> float:
    used = sum(os.times()[:2])
    if process_id is None:
        return used
    with suppress(psutil.NoSuchProcess):
        engine = psutil.Process(process_id)
        for process in (engine, *engine.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
    return float(used)
