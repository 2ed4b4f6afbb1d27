"""Replicas as plain subprocesses of this process: `--fleet local`, for machines without Ray.

Owns the pipes of `pawl_server.engine.process`: the spec goes in on stdin, which stays open as a sign of life (the
engine ends when it closes); events come out on stdout; its log goes through to our stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pawl_server.config import Config
from pawl_server.engine.spec import (
    EngineAddresses,
    EngineEvent,
    EngineFailed,
    EngineReady,
    EngineSpec,
    decode_event,
    encode,
)
from pawl_server.fleet.hosted_fleet import HostedFleet
from pawl_server.fleet.launcher import LaunchError, OnProgress
from pawl_server.fleet.replicas import EventBatch
from pawl_server.fleet.specs import engine_specs, memory_share, num_cores
from pawl_workers.parallel import thread_environment

__all__ = ["LocalFleet", "LocalLauncher", "visible_gpus"]

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "pawl_server.engine.process")
_LINE_BYTES = 1 << 20
_KEPT_LOG_LINES = 20


class LocalLauncher:
    """Starts one subprocess per replica.

    Args:
        command: what to run, for tests.
        gpus: names for CUDA_VISIBLE_DEVICES, dealt out to the replicas in turn; empty = leave it as it is.
    """

    def __init__(self, command: tuple[str, ...] = _COMMAND, gpus: tuple[str, ...] = ()) -> None:
        self._command = command
        self._gpus = gpus

    async def start(self, spec: EngineSpec, on_progress: OnProgress) -> LocalReplica:
        """See ReplicaLauncher."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment(spec),
            limit=_LINE_BYTES,
            # Ctrl-C in a terminal reaches the whole process group; the order of the end is ours to choose.
            start_new_session=True,
        )
        replica = LocalReplica(process, spec.replica)
        try:
            replica.send(spec)
            await replica.ready(on_progress)
        except BaseException:
            await replica.kill()
            raise
        return replica

    def _environment(self, spec: EngineSpec) -> Mapping[str, str]:
        environment = dict(os.environ) | thread_environment(spec.num_threads)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[spec.replica % len(self._gpus)]
        return environment


class LocalReplica:
    """One engine subprocess, starting or running; see supervisor.Running."""

    def __init__(self, process: asyncio.subprocess.Process, index: int) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RuntimeError("the engine process needs three pipes")
        self._process = process
        self._specs, self._output, self._errors = process.stdin, process.stdout, process.stderr
        self._index = index
        self._addresses: EngineAddresses | None = None
        self._failure: EngineFailed | None = None
        self._log_lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)
        self._log_task = asyncio.create_task(self._pass_log_on(), name=f"pawl-replica-{index}-log")

    @property
    def addresses(self) -> EngineAddresses:
        """Where it listens."""
        if self._addresses is None:
            raise RuntimeError("the replica is not ready")
        return self._addresses

    def send(self, spec: EngineSpec) -> None:
        """Hand over the spec."""
        self._specs.write(encode(spec) + b"\n")

    async def ready(self, on_progress: OnProgress) -> None:
        """Wait until it serves.

        Raises:
            LaunchError: it failed or died first.
        """
        while self._addresses is None:
            event = await self._next_event()
            if event is None:
                failure = self._failure or EngineFailed(
                    code="unavailable", reason="DIED_AT_START", message=await self._obituary()
                )
                raise LaunchError(failure, reported=self._failure is not None)
            if isinstance(event, EngineReady):
                self._addresses = event.addresses
            elif isinstance(event, EngineFailed):
                self._failure = event
            else:
                on_progress(event)

    async def died(self) -> str:
        """Return, with the reason, once it is gone."""
        while (event := await self._next_event()) is not None:
            if isinstance(event, EngineFailed):
                self._failure = event
        return self._failure.message if self._failure else await self._obituary()

    async def stop(self, grace_s: float) -> None:
        """Ask it to stop, wait, then kill it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("replica %d did not stop in %.1f s and is killed", self._index, grace_s)
        await self.kill()

    async def kill(self) -> None:
        """Kill it and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            # Its whole session: what it may have started itself goes with it.
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._specs.close()
        await asyncio.wait({self._log_task}, timeout=1.0)
        self._log_task.cancel()

    async def _next_event(self) -> EngineEvent | None:
        while True:
            try:
                line = await self._output.readline()
            except ValueError:  # longer than _LINE_BYTES
                continue
            if not line:
                return None
            try:
                return decode_event(line)
            except msgspec.DecodeError:
                log.warning("replica %d wrote a line that is no event (%d bytes)", self._index, len(line))

    async def _obituary(self) -> str:
        """How it ended, with the end of its log."""
        code = await self._process.wait()
        await asyncio.wait({self._log_task}, timeout=1.0)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = "\n".join(self._log_lines)
        return f"the engine process of replica {self._index} (pid {self._process.pid}) {how}" + (
            f"; the end of its log:\n{lines}" if lines and code >= 0 else ""
        )

    async def _pass_log_on(self) -> None:
        while True:
            try:
                line = await self._errors.readline()
            except ValueError:
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._log_lines.append(text)
            with contextlib.suppress(OSError):  # a closed log pipe does not end the service
                print(text, file=sys.stderr, flush=True)  # noqa: T201 (their log lines, as they are)


class LocalFleet:
    """Supervisor, listener and subprocesses, inside this process. `start`, then `stop`."""

    kind = "local processes"

    def __init__(self, config: Config, token: str, first_incarnation: int = 1) -> None:
        cores = max(1, num_cores() // config.fleet.replicas)
        gpus = visible_gpus(config)
        specs = engine_specs(config, token, cores, memory_bytes=memory_share(config), num_gpus=len(gpus))
        self._port = config.fleet.fleet_port
        self._hosted = HostedFleet(config, token, specs, LocalLauncher(gpus=gpus), first_incarnation)

    @property
    def address(self) -> str:
        """host:port for front ends, once started."""
        return self._hosted.address

    async def start(self) -> None:
        """Listen and begin to start the replicas.

        Raises:
            Unavailable: the fleet's port is in use.
        """
        await self._hosted.start(self._port)

    async def events(self, number: int) -> EventBatch:
        """Events from `number` on; may be none after a while."""
        return await self._hosted.events(number)

    async def stop(self, grace_s: float) -> None:
        """Stop everything; nothing is left on return."""
        await self._hosted.stop(grace_s)


def visible_gpus(config: Config) -> tuple[str, ...]:
    """GPUs to deal out: those of CUDA_VISIBLE_DEVICES, else those the driver shows."""
    if config.model.device == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name)
    driver = Path("/proc/driver/nvidia/gpus")
    return tuple(str(index) for index, _ in enumerate(driver.iterdir())) if driver.is_dir() else ()
