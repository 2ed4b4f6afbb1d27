"""grpc.health.v1: what probes and load balancers ask. Health means progress.

Owns which names are SERVING when: "liveness" speaks of this process alone, every other name of whether a ready
replica makes progress and no drain runs.
"""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

from pawl_server.frontend.core import Core

__all__ = ["Health"]

_PERIOD_S = 0.25
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Keeps a health servicer up to date.

    Args:
        core: says whether requests can be served.
        services: full names of the services, each a name of its own.

    Attributes:
        servicer: to be added to every listener.
        news: set whenever readiness may have changed.
    """

    def __init__(self, core: Core, services: list[str]) -> None:
        self._core = core
        self._names = ["", "readiness", *services]
        self.servicer = aio.HealthServicer()
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Follow the core for ever; cancel to end it."""
        await self.servicer.set("liveness", _SERVING)
        told: bool | None = None
        while True:
            self.news.clear()
            serving = self._core.serving
            if serving is not told:
                for name in self._names:
                    await self.servicer.set(name, _SERVING if serving else _NOT_SERVING)
                told = serving
            # A replica that stands still sends no news: look now and then.
            try:
                async with asyncio.timeout(_PERIOD_S):
                    await self.news.wait()
            except TimeoutError:
                continue
