"""One link to each replica that the fleet calls ready, and what is known of each.

Owns the links: opens them, opens them again, closes them when the fleet drops a replica. The loss of a link
ends its streams (`StreamEvents.on_lost`); which replica a request goes to is the router's business.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from pawl.errors import Unauthenticated, Unavailable
from pawl_server.engine.link.client import EngineLink
from pawl_server.frontend.router import Candidate
from pawl_server.internal.v1 import engine_pb2, fleet_pb2
from pawl_server.kv.block_hash import CacheRoot

__all__ = ["Replica", "Replicas"]

log = logging.getLogger(__name__)

_RETRY_S = (0.05, 2.0)

Key = tuple[int, int]
"""Number and incarnation: one process."""


class Replica:
    """One engine process.

    Attributes:
        listing: the fleet's latest word.
        link: None while not connected.
        linked_at: when the link came up, `time.monotonic()`; infinite while it has not.
        outstanding_tokens: prompt and expected output tokens of this front end's requests there.
    """

    def __init__(self, listing: fleet_pb2.Replica) -> None:
        self.listing = listing
        self.link: EngineLink | None = None
        self.linked_at = math.inf
        self.outstanding_tokens = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def key(self) -> Key:
        """Number and incarnation."""
        return self.listing.index, self.listing.incarnation

    @property
    def ready(self) -> bool:
        """Whether it may get requests: the fleet says READY, and the link is up."""
        connected = self.link is not None and not self.link.closed.done()
        return connected and self.listing.state == fleet_pb2.REPLICA_STATE_READY

    @property
    def progressing(self) -> bool:
        """Whether steps complete or nothing is to do; true before the first report."""
        return self.link is not None and (self.link.load.progressing or not self.link.load.num_blocks)

    @property
    def silence_s(self) -> float:
        """Seconds since its last report; 0 while it has no link."""
        return 0.0 if self.link is None else max(0.0, time.monotonic() - self.link.load_time)

    def candidate(self) -> Candidate[Key]:
        """What the router looks at."""
        if self.link is None:
            raise Unavailable(f"replica {self.listing.index} has no link", reason="NOT_READY")
        load, welcome = self.link.load, self.link.welcome
        return Candidate(
            key=self.key,
            outstanding_tokens=self.outstanding_tokens,
            num_own=self.link.num_streams,
            num_sequences=load.running + load.waiting,
            num_blocks=welcome.num_blocks,
            root=CacheRoot(welcome.model.revision or welcome.model.source, welcome.model.data_type, welcome.block_size),
        )


class Replicas:
    """All replicas of the fleet's list.

    Args:
        token: shared token of the internal listeners.
        frontend_id: id of this process, for the engines' logs.
        heartbeat_timeout_s: an engine silent for so long counts as lost.
        on_change: told after every change of the list or of a link.
        on_cache: told what changes in a replica's prefix cache.
    """

    def __init__(
        self,
        token: str,
        frontend_id: str,
        heartbeat_timeout_s: float,
        on_change: Callable[[], None],
        on_cache: Callable[[Key, engine_pb2.CacheEvents], None] = lambda _key, _events: None,
    ) -> None:
        self._token = token
        self._frontend_id = frontend_id
        self._timeout_s = heartbeat_timeout_s
        self._on_change = on_change
        self._on_cache = on_cache
        self._replicas: dict[Key, Replica] = {}
        self._facts: engine_pb2.ModelFacts | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def facts(self) -> engine_pb2.ModelFacts | None:
        """What the engines say of the model; the latest word, None before the first."""
        return self._facts

    def all(self) -> list[Replica]:
        """Every replica of the list, by number."""
        return [self._replicas[key] for key in sorted(self._replicas)]

    def ready(self) -> list[Replica]:
        """The replicas that may get requests: those that make progress, else all that are ready."""
        found = [replica for replica in self.all() if replica.ready]
        return [replica for replica in found if replica.progressing] or found

    def serving(self) -> bool:
        """Whether at least one ready replica makes progress."""
        return any(replica.ready and replica.progressing for replica in self._replicas.values())

    def update(self, listing: Sequence[fleet_pb2.Replica]) -> None:
        """Take over the fleet's list: connect what is new, drop what is gone."""
        wanted = {(item.index, item.incarnation): item for item in listing}
        for key in self._replicas.keys() - wanted.keys():
            self._drop(self._replicas.pop(key))
        for key, item in wanted.items():
            replica = self._replicas.setdefault(key, Replica(item))
            replica.listing = item
            reachable = bool(item.address) and item.state in (
                fleet_pb2.REPLICA_STATE_READY,
                fleet_pb2.REPLICA_STATE_DRAINING,
            )
            if reachable and replica.task is None:
                replica.task = asyncio.create_task(self._keep(replica), name=f"replica {item.index}")
            elif not reachable and replica.task is not None:
                self._drop(replica)
        self._on_change()

    async def close(self) -> None:
        """Close every link; streams that are open are told that they are lost."""
        for replica in self._replicas.values():
            self._drop(replica)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _drop(self, replica: Replica) -> None:
        """Close a replica's link in the background."""
        task, replica.task = replica.task, None
        if task is not None:
            task.cancel()
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _keep(self, replica: Replica) -> None:
        """Hold a link to a replica until cancelled; try again however it ends, since the fleet knows best."""
        number, pause, told = replica.listing.index, _RETRY_S[0], ""
        while True:
            replica.linked_at = math.inf
            unexpected: Exception | None = None
            try:
                trouble = await self._hold(replica)
            except (Unavailable, Unauthenticated) as error:
                trouble = f"cannot be reached: {error}"
            except Exception as error:
                trouble, unexpected = f"the link failed: {error!r}", error
            if time.monotonic() - replica.linked_at > _RETRY_S[1]:
                # The link held for a while: whatever comes now is news.
                pause, told = _RETRY_S[0], ""
            if trouble != told:
                log.warning("replica %d: %s; trying again", number, trouble, exc_info=unexpected)
            told = trouble
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_S[1])

    async def _hold(self, replica: Replica) -> str:
        """Hold one link until it is lost; says why.

        Raises:
            Unauthenticated: the engine does not accept the token.
            Unavailable: it cannot be reached, says nothing, or speaks another version.
        """
        try:
            async with EngineLink(replica.listing.address, self._token, self._frontend_id, self._timeout_s) as link:
                # What changed while there was no link is not known.
                self._on_cache(replica.key, engine_pb2.CacheEvents(reset=True))
                link.on_cache_events = partial(self._on_cache, replica.key)
                replica.link, replica.linked_at = link, time.monotonic()
                self._facts = link.welcome.model
                self._on_change()
                # Shielded: cancelling this task must not cancel the link's own future.
                return await asyncio.shield(link.closed)
        finally:
            replica.link = None
            self._on_change()
