"""`python -m pawl_loadtest.startup`: seconds from the command to the first SERVING of a server, phase by phase.

Makes a checkpoint of a named shape with random weights in bf16, then starts `pawl serve --fleet local` on it several
times and asks the health service. Phases are told apart by when the server's own events arrive, so that they add up
to the whole; medians over the rounds. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from pawl_loadtest.arguments import positive
from pawl_loadtest.peers.checkpoint import make_checkpoint
from pawl_loadtest.peers.shapes import SHAPES

__all__ = ["PHASES", "main", "measure_start"]

PHASES = ("command", "imports", "weights", "warm-up", "self-test", "front end", "health")
_MOST_START_S = 180.0
_MOST_STOP_S = 60.0


async def measure_start(checkpoint: Path, flags: Sequence[str] = ()) -> dict[str, float]:
    """Start a server, wait until health says SERVING, and stop it.

    Returns:
        Seconds of each of PHASES.

    Raises:
        RuntimeError: it ended before it was ready, or did not stop in order.
        TimeoutError: it was not ready in time.
    """
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pawl_server.cli", "serve", str(checkpoint), "--fleet=local", "--device=cpu", "--port=0",
        "--admin-port=0", "--metrics-port=0", "--log-format=json", "--log-level=warning", *flags,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ends: dict[str, float] = {}
    try:
        async with asyncio.timeout(_MOST_START_S):
            address = await _follow(process, ends)
            async with grpc.aio.insecure_channel(address) as channel:
                request = health_pb2.HealthCheckRequest(service="readiness")
                check = channel.unary_unary(
                    "/grpc.health.v1.Health/Check",
                    request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                    response_deserializer=health_pb2.HealthCheckResponse.FromString,
                )
                answer = await check(request, wait_for_ready=True)
        ends["health"] = time.monotonic()
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError(f"READY was said, but health answers {answer.status}")
    finally:
        if process.returncode is None:
            process.terminate()
        code = await asyncio.wait_for(process.wait(), _MOST_STOP_S)
    if code:
        raise RuntimeError(f"the server ended with exit code {code}")
    seconds, before = {}, started
    for phase in PHASES:
        seconds[phase] = ends[phase] - before
        before = ends[phase]
    return seconds


async def _follow(process: asyncio.subprocess.Process, ends: dict[str, float]) -> str:
    """Note when each phase ended; returns where clients connect."""
    if process.stdout is None:
        raise RuntimeError("the server needs a pipe")
    async for line in process.stdout:
        event, now = json.loads(line), time.monotonic()
        progress = event.get("progress") or {}
        if event["event"] == "begin":
            ends["command"] = now
        elif event["event"] == "ready":
            ends["front end"] = now
            return str(event["grpc"])
        elif progress.get("step") in PHASES and (progress.get("total", 0) == progress.get("done", 0) > 0):
            ends[progress["step"]] = now
    raise RuntimeError("the server ended before it was ready; its log is above")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.startup", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("flags", nargs="*", help="more flags of `pawl serve`, after --")
    options = parser.parse_args(arguments)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="pawl-startup-") as name:
        checkpoint = make_checkpoint(SHAPES[options.shape], Path(name))
        for _ in range(options.rounds):
            seconds = asyncio.run(measure_start(checkpoint, options.flags))
            rounds.append({**seconds, "total": sum(seconds.values())})
    sys.stdout.write(f"{options.shape}, bf16, {os.cpu_count()} cores, {options.rounds} rounds; s, median (min-max)\n")
    for phase in (*PHASES, "total"):
        values = [seconds[phase] for seconds in rounds]
        sys.stdout.write(f"{phase:<12}{statistics.median(values):>8.2f}  ({min(values):.2f}-{max(values):.2f})\n")
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "rounds": rounds}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
