"""The fleet's end of an engine's link: one call. Knows no engine."""

from __future__ import annotations

import contextlib

import grpc

from pawl_server.engine.link.auth import token_metadata
from pawl_server.engine.link.protocol import channel_options
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc

__all__ = ["ask_to_stop"]


async def ask_to_stop(address: str, token: str, timeout_s: float) -> None:
    """Ask an engine to end after the step that runs. Whether it did is told by its process.

    Args:
        address: host:port of its link.
        token: the shared token.
        timeout_s: how long to wait for its answer. One that cannot be reached is not waited for.
    """
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Stop(engine_pb2.StopRequest(), metadata=token_metadata(token), timeout=timeout_s)
