"""The front end's links to replicas, over real sockets on loopback."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pawl_server.frontend.replicas import Key, Replicas
from pawl_server.internal.v1 import engine_pb2, fleet_pb2
from tests.fakes.scripted_engine import scripted_engine
from tests.fakes.waiting import until


class _Told:
    """Takes what is said of prefix caches; raises the first `num_failures` times."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_calls = 0
        self._num_failures = num_failures

    def __call__(self, key: Key, events: engine_pb2.CacheEvents) -> None:
        self.num_calls += 1
        if self.num_calls <= self._num_failures:
            raise ValueError("planted")

    def of_one(self, events: engine_pb2.CacheEvents) -> None:
        """Of the one replica there is."""
        self((0, 1), events)


@asynccontextmanager
async def _replicas(address: str, told: _Told) -> AsyncIterator[Replicas]:
    replicas = Replicas("secret", "test", 30.0, lambda: None, told)
    replicas.update([fleet_pb2.Replica(incarnation=1, state=fleet_pb2.REPLICA_STATE_READY, address=address)])
    try:
        yield replicas
    finally:
        await replicas.close()


async def test_a_link_that_fails_as_nobody_expected_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """With the same incarnation, and the reason is logged once, with where it came from."""
    told = _Told(num_failures=3)
    async with scripted_engine() as engine, _replicas(engine.address, told) as replicas:
        assert replicas.ready() == []
        await until(lambda: len(replicas.ready()) == 1)
        assert told.num_calls == 4
    (record,) = [record for record in caplog.records if record.name.endswith("frontend.replicas")]
    assert record.levelno == logging.WARNING
    assert "ValueError('planted')" in record.getMessage()
    assert record.exc_info is not None


async def test_a_link_that_fails_while_it_is_used_is_opened_again() -> None:
    told = _Told()
    async with scripted_engine() as engine, _replicas(engine.address, told) as replicas:
        await until(lambda: len(replicas.ready()) == 1)
        first = replicas.ready()[0].link
        assert first is not None
        first.on_cache_events = _Told(num_failures=1).of_one
        engine.send(engine_pb2.ConnectResponse(cache_events=engine_pb2.CacheEvents(reset=True)))
        await until(lambda: bool(replicas.ready()) and replicas.ready()[0].link is not first)
        assert "planted" in await first.closed
