"""Fixtures of the SDK's tests: a fake server, clients whose clock does not wait."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from pawl import AsyncClient, Client
from pawl.testing import FakeServer, ManualClock


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the shell that runs the tests must not reach them."""
    secrets = ("PAWL_API_KEY", "PAWL_INTERNAL_TOKEN", "PAWL_INTERNAL_TOKEN_FILE")
    for name in ("PAWL_TARGET", "PAWL_ADMIN_TARGET", *secrets, "PAWL_TIMEOUT", "PAWL_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def client(server: FakeServer, clock: ManualClock) -> Iterator[Client]:
    with Client(server.target, clock=clock.clock) as made:
        yield made


@pytest.fixture
async def async_client(server: FakeServer, clock: ManualClock) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, clock=clock.clock) as made:
        yield made
