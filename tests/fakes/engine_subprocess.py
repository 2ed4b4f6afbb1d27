"""An engine process, its events read and its exit awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from pawl_server.engine.spec import EngineEvent, EngineReady, EngineSpec, decode_event, encode

_ROOT = Path(__file__).parents[2]
_DEADLINE_S = 60.0


class EngineProcess:
    """A started process. `events` grows as its lines come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())
        self.events: list[EngineEvent] = []

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            event = decode_event(line)
            self.events.append(event)
            if isinstance(event, EngineReady):
                self._ready.set_result(event)

    async def ready(self) -> EngineReady:
        """Wait until it serves."""
        return await asyncio.wait_for(self._ready, _DEADLINE_S)

    async def exit_code(self) -> int:
        """Wait until it is gone, and all its events are read."""
        code = await asyncio.wait_for(self._process.wait(), _DEADLINE_S)
        await self._reader
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process."""
        self._process.send_signal(number)

    def close_stdin(self) -> None:
        """What the death of the parent does."""
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.asynccontextmanager
async def engine_process(spec: EngineSpec, module: str = "tests.fakes.engine_process") -> AsyncIterator[EngineProcess]:
    """Start one, with the fake worker unless `module` says otherwise; it is killed on the way out."""
    paths = [str(_ROOT / part) for part in ("client", "server", "workers", ".")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=_ROOT,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(encode(spec) + b"\n")
    engine = EngineProcess(process)
    try:
        yield engine
    finally:
        if process.returncode is None:
            process.kill()
        await engine.exit_code()
