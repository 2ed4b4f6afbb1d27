"""The life of an engine in its process, told by events: the same in a subprocess and in a Ray actor.

Owns the order of start and run, and the words for a failure. How events travel is the process's business.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from pawl.errors import PawlError
from pawl_server.collector import collector_at_rest
from pawl_server.engine.engine import Engine
from pawl_server.engine.spec import EngineEvent, EngineFailed, EngineReady
from pawl_workers.errors import WorkerError

__all__ = ["Tell", "describe_failure", "live"]

Tell = Callable[[EngineEvent], None]


async def live(engine: Engine, tell: Tell) -> None:
    """Start an engine, say that it is ready, and return once it was asked over its link to end.

    To stop it is the caller's.

    Raises:
        PawlError: it could not start: a setting is wrong, or no port is free.
        WorkerError: it could not start: the model cannot be loaded or fails its self-test.
        ServerError: its worker is beyond repair.
    """
    started = time.monotonic()
    with collector_at_rest():
        addresses = await engine.start()
    tell(EngineReady(addresses=addresses, seconds=time.monotonic() - started))
    await engine.run()


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
