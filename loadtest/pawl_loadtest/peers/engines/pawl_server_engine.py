"""pawl as it is served: `pawl serve`, its fleet in Ray, its front end and this client on the same cores, over gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from pawl import AsyncClient, Stop
from pawl_server.serve.priority import give_way

if TYPE_CHECKING:
    from collections.abc import Sequence

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0
_REQUEST_TIMEOUT_S = 1800.0


class Engine:
    """A server with its defaults, but for its size and a prefix cache; `settings` are flags, without their dashes."""

    def __init__(self, checkpoint: str, threads: int, workloads: list[list[int]], settings: dict[str, str]) -> None:
        blocks = max(n * (-(-(prompt + output) // 16) + 1) for n, prompt, output in workloads)
        flags = {
            "model": checkpoint,
            "num-threads": str(threads),
            "max-running": str(max(requests for requests, _, _ in workloads)),
            "max-context": str(max(prompt + output for _, prompt, output in workloads)),
            "num-blocks": str(blocks),
            "port": "0",
            "admin-port": "0",
            "metrics-port": "0",
            "log-level": "warning",
        }
        self._folder = tempfile.TemporaryDirectory(prefix="pawl-peers-")
        ready = Path(self._folder.name) / "ready.json"
        command = [sys.executable, "-m", "pawl_server.cli", "serve", "--no-prefix-cache", "--ready-file", str(ready)]
        command += [part for name, value in (flags | settings).items() for part in (f"--{name}", value)]
        self._client: AsyncClient | None = None
        started = time.monotonic()
        # What is set for gRPC is meant for this client alone.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        try:
            target = self._wait_ready(ready)
        except BaseException:
            self.close()
            raise
        self.facts = {"version": "pawl serve", "flags": command[3:], "ready_s": time.monotonic() - started}
        give_way()  # a client elsewhere would take nothing of the cores of what is measured; this one takes little
        self._loop = uvloop.new_event_loop()
        self._client = self._loop.run_until_complete(_connect(target))

    def _wait_ready(self, ready: Path) -> str:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready.exists():
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._server.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready within {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        target: str = json.loads(ready.read_text(encoding="utf-8"))["grpc"]
        return target

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, object]:
        """Greedy tokens of each prompt, exactly so many, and the seconds from the first request to the last token."""
        if self._client is None:
            raise RuntimeError("the server is not connected")
        started = time.perf_counter()
        tokens = self._loop.run_until_complete(_stream_all(self._client, prompts, output_tokens))
        return {"tokens": tokens, "seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Drain the server and end it."""
        if self._client is not None:
            self._loop.run_until_complete(self._client.close())
        if self._server.poll() is None:
            self._server.send_signal(signal.SIGTERM)
            try:
                self._server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._folder.cleanup()


async def _connect(target: str) -> AsyncClient:
    client = AsyncClient(target, retries=0)
    await client.wait_ready(timeout=60)
    return client


async def _stream_all(client: AsyncClient, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
    return await asyncio.gather(*(_stream(client, prompt, output_tokens) for prompt in prompts))


async def _stream(client: AsyncClient, prompt: Sequence[int], output_tokens: int) -> list[int]:
    stop = Stop(max_tokens=output_tokens, ignore_eos=True)
    request = client.stream(prompt, stop=stop, temperature=0.0, token_ids=True, timeout=_REQUEST_TIMEOUT_S)
    async with request as stream:
        return list((await stream.final()).token_ids)
