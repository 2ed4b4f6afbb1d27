"""Where a served token's CPU time goes: the engine, the front end, the client, and what watches over them.

Unlike seconds, which drift with whatever else the machine's host does, CPU time says what serving takes from the cores
that the engine computes on: a share that no run over gRPC can win back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import psutil

__all__ = ["CLIENT", "ENGINE", "cpu_seconds", "spent"]

ENGINE, CLIENT, _REST = "engine", "client", "Ray and fleet"
_PARTS = {"EngineReplica": ENGINE, "frontend_child": "front end"}  # by what is in a command line


def cpu_seconds(process_id: int) -> dict[str, float]:
    """CPU seconds so far, by part, of a process that is a client and of the server that it has started.

    A process that ends meanwhile is left out. Empty when the client itself has ended.
    """
    found = dict.fromkeys((ENGINE, "front end", CLIENT, _REST), 0.0)
    try:
        client = psutil.Process(process_id)
        found[CLIENT] = _used(client)
        processes = client.children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            part = next((part for mark, part in _PARTS.items() if mark in command), _REST)
            found[part] += _used(process)
    return found


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The difference, by part."""
    return {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
