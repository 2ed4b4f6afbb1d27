"""What every way of starting a server must hold: the checks, shared by the local and the Ray tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import pawl
from pawl import AdminClient, Client, Stop
from tests.fakes.servers import RunningServer, environment
from tests.fakes.waiting import wait_until

_HEALTH: Any = health_pb2_grpc.HealthStub  # has no types for its calls
LONG = Stop(max_tokens=1500, ignore_eos=True)


def answers(server: RunningServer, *, streams: int = 4) -> None:
    """Streams at once through the SDK give whole answers."""
    with Client(server.target) as client, ThreadPoolExecutor(streams) as pool:
        asked = [f"Anna has {word} apples. The ball is with Tom." for word in ("two", "three", "four", "five")]
        completions = list(
            pool.map(lambda text: client.generate(text, max_tokens=12, temperature=0.0), asked[:streams])
        )
    for completion in completions:
        assert completion.finish_reason is not None
        assert 1 <= completion.usage.output_tokens <= 12


def survives_the_loss_of_an_engine(server: RunningServer, *, replicas: int = 1) -> None:
    """Its stream ends UNAVAILABLE with the reason, it is rebuilt, and the next request succeeds."""
    lost = server.engines()
    assert len(lost) == replicas
    with Client(server.target, retries=0) as client:
        with client.stream("The hat is red.", stop=LONG, temperature=0.0) as stream:
            assert next(stream.text_stream)
            for engine in lost:
                engine.kill()
            with pytest.raises(pawl.StreamBroken) as broken:
                stream.final()
        assert broken.value.reason == "WORKER_LOST"
        gone = {engine.pid for engine in lost}

        def rebuilt() -> bool:
            return len([engine for engine in server.engines() if engine.pid not in gone]) == replicas

        wait_until(rebuilt, 60.0)
        client.wait_ready(timeout=60.0)
        assert client.generate("The hat is red.", max_tokens=4).usage.output_tokens >= 1


def _readiness(channel: grpc.Channel) -> int:
    return int(_HEALTH(channel).Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10).status)


def drains_on_sigterm(server: RunningServer) -> None:
    """A running stream finishes, health and new requests are refused, the exit code is 0 and nothing is left."""
    tokens = 600
    with Client(server.target, retries=0) as client, grpc.insecure_channel(server.target) as channel:
        assert _readiness(channel) == health_pb2.HealthCheckResponse.SERVING
        with client.stream("The hat is red.", stop=Stop(max_tokens=tokens, ignore_eos=True)) as stream:
            assert next(stream.text_stream)
            server.signal(signal.SIGTERM)
            refusals: list[pawl.PawlError] = []

            def refused() -> bool:
                try:
                    client.generate("x", max_tokens=1)
                except pawl.Unavailable as error:
                    refusals.append(error)
                return bool(refusals)

            wait_until(refused, 30.0)
            assert _readiness(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            completion = stream.final()
        assert completion.usage.output_tokens == tokens
    assert server.wait() == 0, server.errors
    assert server.leftovers() == []


def frees_what_a_dead_client_held(server: RunningServer, script: str) -> None:
    """SIGKILL of a client in mid-stream: its request is gone from the engine."""
    with AdminClient(server.admin) as admin:
        client = subprocess.Popen(
            [sys.executable, "-c", script, server.target], stdout=subprocess.PIPE, env=environment()
        )
        assert client.stdout is not None
        try:
            assert client.stdout.readline().strip() == b"begun"
            assert len(admin.requests()) == 1
        finally:
            client.kill()
            client.wait(10)
            client.stdout.close()
        wait_until(lambda: admin.requests() == [], 30.0)


CLIENT_SCRIPT = """
import sys
from pawl import Client, Stop
with Client(sys.argv[1]) as client:
    with client.stream("The hat is red.", stop=Stop(max_tokens=1900, ignore_eos=True), request_id="doomed",
                       min_chunk_interval=0.05) as stream:
        next(stream.text_stream)
        print("begun", flush=True)
        for piece in stream.text_stream:
            pass
"""
