"""One engine as a plain subprocess: `python -m pawl_server.engine.process`, started by the local fleet.

Reads its spec as one JSON line on stdin, and lives as long as stdin is open: when the parent dies, so does it.
Writes one JSON line per event on stdout (`pawl_server.engine.spec`), and logs on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from typing import BinaryIO

import msgspec

from pawl_server.config import LogSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.life import describe_failure, live
from pawl_server.engine.load import LoadWorker, load_torch_worker
from pawl_server.engine.spec import EngineEvent, EngineFailed, EngineSpec, decode_spec, encode
from pawl_server.logs import set_up_logs

__all__ = ["main"]

log = logging.getLogger(__name__)

_FAILED_EXIT_CODE = 1


def main(load_worker: LoadWorker = load_torch_worker) -> None:
    """Run one engine; ends the process. Exit code 0 after SIGTERM, the end of stdin or a `Stop`, else not 0."""
    events = _Events()
    code = _FAILED_EXIT_CODE
    try:
        spec = decode_spec(sys.stdin.buffer.readline())
        set_up_logs(LogSettings(log_level=spec.log_level, log_format=spec.log_format), f"engine-{spec.replica}")
        code = asyncio.run(_serve(spec, events, load_worker))
    except msgspec.DecodeError as error:
        events.write(EngineFailed(code="invalid_request", reason="BAD_SPEC", message=str(error)))
    finally:
        sys.stderr.flush()
        # A hung step, or libraries' own threads, must not keep a process that has done its work.
        os._exit(code)


class _Events:
    """Lines for the parent. Takes stdout for itself: what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._lock = threading.Lock()  # progress comes from the worker's thread, too

    def write(self, event: EngineEvent) -> None:
        """Write one line. A parent that is gone is noticed at stdin."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._file.write(encode(event) + b"\n")


async def _serve(spec: EngineSpec, events: _Events, load_worker: LoadWorker) -> int:
    """Start, run, and stop when told to; returns the exit code."""
    stop = _stop_signals()
    engine = Engine(spec, events.write, load_worker)
    living, stopping = asyncio.create_task(live(engine, events.write)), asyncio.create_task(stop.wait())
    await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if living.done() and (error := living.exception()) is not None:
        log.error("replica %d ends", spec.replica, exc_info=error)
        events.write(describe_failure(error))
        return _FAILED_EXIT_CODE
    log.info("replica %d stops", spec.replica)
    await engine.stop()
    return 0


def _stop_signals() -> asyncio.Event:
    """An event for SIGTERM and for the end of stdin. SIGINT is the parent's: a terminal sends it to both."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_parent, name="pawl-parent", daemon=True).start()
    return stop


if __name__ == "__main__":
    main()
