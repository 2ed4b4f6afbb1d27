"""grpc.health.v1: what probes and load balancers ask. Health means progress.

Owns which names are SERVING when: "liveness" speaks of this process alone, every other name of whether a ready
replica makes progress and no drain runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

__all__ = ["Health"]

log = logging.getLogger(__name__)

_PERIOD_S = 0.25
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Keeps a health servicer up to date.

    Args:
        serving: says whether requests can be served.
        services: full names of the services, each a name of its own.

    Attributes:
        servicer: to be added to every listener.
        news: set whenever readiness may have changed.
    """

    def __init__(self, serving: Callable[[], bool], services: list[str]) -> None:
        self._serving = serving
        self._names = ["", "readiness", *services]
        self.servicer = aio.HealthServicer()
        self.news = asyncio.Event()
        self._told: bool | None = None
        self._failure = ""

    async def look(self) -> None:
        """Look once and say what is seen; what cannot be found out counts as not serving. Never raises."""
        try:
            if self._told is None:
                await self.servicer.set("liveness", _SERVING)
            serving = self._serving()
            if serving is not self._told:
                await self._tell(serving)
            self._told, self._failure = serving, ""
        except Exception as error:
            if repr(error) != self._failure:
                log.exception("health cannot be found out: NOT_SERVING until it can")
            self._told, self._failure = None, repr(error)
            with contextlib.suppress(Exception):  # to tell it may be what failed
                await self._tell(False)

    async def run(self) -> None:
        """Follow the core for ever; cancel to end it."""
        while True:
            self.news.clear()
            await self.look()
            # A replica that stands still sends no news: look now and then.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_S):
                    await self.news.wait()

    async def _tell(self, serving: bool) -> None:
        for name in self._names:
            await self.servicer.set(name, _SERVING if serving else _NOT_SERVING)
