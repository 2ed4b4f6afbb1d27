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
import time
import traceback
from typing import BinaryIO

import msgspec

from pawl.errors import PawlError
from pawl_server.collector import collector_at_rest
from pawl_server.config import LogSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.load import LoadWorker, load_torch_worker
from pawl_server.engine.spec import EngineEvent, EngineFailed, EngineReady, EngineSpec, decode_spec, encode
from pawl_server.logs import set_up_logs
from pawl_workers.errors import WorkerError

__all__ = ["describe_failure", "main"]

log = logging.getLogger(__name__)

_FAILED_EXIT_CODE = 1


def main(load_worker: LoadWorker = load_torch_worker) -> None:
    """Run one engine; ends the process. Exit code 0 after SIGTERM or the end of stdin, else not 0."""
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


def describe_failure(error: BaseException) -> EngineFailed:
    """The root cause of a failure in words for an operator."""
    if isinstance(error, PawlError):
        return EngineFailed(code=error.code, reason=error.reason, message=error.message)
    if isinstance(error, WorkerError):
        reason = type(error).__name__.removesuffix("Error")
        return EngineFailed(code="unavailable", reason=_upper(reason), message=str(error))
    return EngineFailed(
        code="internal",
        reason="ENGINE_FAILED",
        message=f"{type(error).__name__}: {error}",
        detail="".join(traceback.format_exception(error))[-4000:],
    )


def _upper(name: str) -> str:
    """OutOfMemory as OUT_OF_MEMORY."""
    return "".join(f"_{c}" if c.isupper() else c for c in name).lstrip("_").upper()


async def _serve(spec: EngineSpec, events: _Events, load_worker: LoadWorker) -> int:
    """Start, run, and stop when told to; returns the exit code."""
    started = time.monotonic()
    stop = _stop_signals()
    engine = Engine(spec, events.write, load_worker)

    async def work() -> None:
        with collector_at_rest():
            addresses = await engine.start()
        events.write(EngineReady(addresses=addresses, seconds=time.monotonic() - started))
        await engine.run()

    working, stopping = asyncio.create_task(work()), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        log.info("replica %d stops", spec.replica)
        await engine.stop()
        return 0
    error = working.exception()
    if error is not None:
        log.error("replica %d ends", spec.replica, exc_info=error)
        events.write(describe_failure(error))
    return _FAILED_EXIT_CODE


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
