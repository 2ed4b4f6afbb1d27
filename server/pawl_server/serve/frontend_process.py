"""The parent's side of a front end: a child process that has neither Ray nor torch.

Owns its pipes and its end; what it does is `frontend_child`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

import msgspec

from pawl.errors import InvalidRequest, Unavailable
from pawl_server.serve.events import ServerAddresses
from pawl_server.serve.orders import FrontendOrder, FrontendReady, decode_answer, encode

__all__ = ["FrontendProcess"]

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "pawl_server.serve.frontend_child")
_KILL_MARGIN_S = 5.0  # beyond the grace, for closing listeners
# gRPC reads this when it is imported. By itself it has threads that read sockets, and each message wakes one of them
# and then the one on which asyncio waits for gRPC. Many threads gain by many cores; a front end is one of Python.
_ONE_POLLER = ("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")


class FrontendProcess:
    """One front end. `launch`, `ready`, then `stop`.

    Args:
        order: what it is told.
        command: what to run, for tests.
    """

    def __init__(self, order: FrontendOrder, command: tuple[str, ...] = _COMMAND) -> None:
        self._order = order
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def launch(self) -> None:
        """Start it. Its listeners open at once; health says NOT_SERVING until a replica is ready."""
        # Ray's token and addresses are not for the process that faces the network.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment.setdefault(*_ONE_POLLER)
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the front end process needs two pipes")
        process.stdin.write(encode(self._order))

    async def ready(self) -> ServerAddresses:
        """Wait until it serves.

        Raises:
            InvalidRequest: it refuses a setting.
            Unavailable: it failed.
        """
        process = self._process
        if process is None or process.stdout is None:
            raise RuntimeError("the front end is not started")
        return await self._answer(process, await process.stdout.readline())

    async def _answer(self, process: asyncio.subprocess.Process, line: bytes) -> ServerAddresses:
        if not line:
            code = await process.wait()
            raise Unavailable(
                f"the front end process ended with exit code {code} before it served; its log is above",
                reason="FRONTEND_FAILED",
            )
        try:
            answer = decode_answer(line)
        except msgspec.DecodeError as error:
            raise Unavailable(
                f"the front end wrote a line that is no answer ({error})", reason="FRONTEND_FAILED"
            ) from error
        if isinstance(answer, FrontendReady):
            return answer.addresses
        kind = InvalidRequest if answer.invalid else Unavailable
        raise kind(answer.message, reason=answer.reason)

    async def ended(self) -> int:
        """Its exit code, once it ended (negative: by that signal)."""
        if self._process is None:
            raise RuntimeError("the front end is not started")
        return await self._process.wait()

    async def stop(self, grace_s: float) -> int:
        """Let it drain, then kill it; returns its exit code."""
        process = self._process
        if process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        try:
            async with asyncio.timeout(grace_s + _KILL_MARGIN_S):
                code = await process.wait()
        except TimeoutError:
            log.warning("front end %d did not end %.0f s after its grace and is killed", process.pid, _KILL_MARGIN_S)
            self.kill()
            code = await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        return code

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
