"""GetServerInfo, WatchLoad, ListRequests, Drain and FlushPrefixCache: for operators, on a listener of its own."""

# ruff: noqa: N802 - gRPC names the methods
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version

from google.protobuf import duration_pb2

from pawl.errors import PawlError, Unavailable
from pawl.v1 import admin_pb2, admin_pb2_grpc
from pawl_server.frontend import convert, validate_other
from pawl_server.frontend.calls import Context
from pawl_server.frontend.core import Core
from pawl_server.frontend.drain import drain
from pawl_server.frontend.replicas import Replica
from pawl_server.internal.v1 import engine_pb2, fleet_pb2

__all__ = ["AdminService", "package_version"]

_PAGE = 100
_WORKER_STATES = {
    fleet_pb2.REPLICA_STATE_STARTING: admin_pb2.WORKER_STATE_STARTING,
    fleet_pb2.REPLICA_STATE_READY: admin_pb2.WORKER_STATE_READY,
    fleet_pb2.REPLICA_STATE_DRAINING: admin_pb2.WORKER_STATE_READY,
    fleet_pb2.REPLICA_STATE_DEAD: admin_pb2.WORKER_STATE_LOST,
    fleet_pb2.REPLICA_STATE_BACKOFF: admin_pb2.WORKER_STATE_RESTARTING,
}


def package_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("pawl-serve")
    except PackageNotFoundError:
        return "unknown"


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """What operators ask."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: Context
    ) -> admin_pb2.GetServerInfoResponse:
        """See the proto."""
        ready = [replica.link.welcome for replica in self._core.replicas.all() if replica.ready and replica.link]
        first = ready[0] if ready else engine_pb2.Welcome()
        return admin_pb2.GetServerInfoResponse(
            version=package_version(),
            instance_id=self._core.instance_id,
            start_time=convert.timestamp(self._core.start_unix_ns),
            block_size=first.block_size,
            block_count=sum(welcome.num_blocks for welcome in ready),
            max_running_requests=first.max_running,
            max_batch_tokens=first.max_batch_tokens,
            max_queued_requests=self._core.config.frontend.max_queued_requests,
            tensor_parallel_size=1,
            replica_count=len(ready),
            config=self._core.config.shown(),
        )

    async def WatchLoad(
        self, request: admin_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[admin_pb2.WatchLoadResponse]:
        """See the proto."""
        interval_s = validate_other.watch_interval_s(request)
        told: bytes | None = None
        tokens, when = self._output_tokens(), time.monotonic()
        while True:
            load = self._load()
            now, total = time.monotonic(), self._output_tokens()
            # A replica that was replaced counts from 0 again.
            load.output_tokens_per_second = max(0, total - tokens) / (now - when) if told is not None else 0.0
            shown = _without_clocks(load)
            if shown != told:
                yield admin_pb2.WatchLoadResponse(load=load)
                told, tokens, when = shown, total, now
            await asyncio.sleep(interval_s)

    async def ListRequests(
        self, request: admin_pb2.ListRequestsRequest, context: Context
    ) -> admin_pb2.ListRequestsResponse:
        """See the proto."""
        size, offset = validate_other.page(request, _PAGE)
        linked = [replica for replica in self._core.replicas.all() if replica.link is not None]
        lists = await asyncio.gather(*(self._sequences(replica) for replica in linked))
        states = sorted((state for part in lists for state in part), key=lambda s: -s.age.ToNanoseconds())
        more = offset + size < len(states)
        return admin_pb2.ListRequestsResponse(
            requests=states[offset : offset + size],
            next_page_token=validate_other.page_token(offset + size) if more else "",
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        """See the proto."""
        grace_s = validate_other.drain_grace_s(request, self._core.config.frontend.drain_grace_s)
        return admin_pb2.DrainResponse(cancelled_request_count=await drain(self._core, grace_s))

    async def FlushPrefixCache(
        self, request: admin_pb2.FlushPrefixCacheRequest, context: Context
    ) -> admin_pb2.FlushPrefixCacheResponse:
        """See the proto."""
        links = [replica.link for replica in self._core.replicas.all() if replica.link is not None]
        if not links:
            raise self._core.not_ready("no replica is connected")
        freed = await asyncio.gather(*(link.flush_cache() for link in links), return_exceptions=True)
        failed = [result for result in freed if isinstance(result, BaseException)]
        if failed:
            text = f"{len(failed)} of {len(links)} replicas did not empty their cache: {failed[0]}"
            raise Unavailable(text, reason="ENGINE_UNREACHABLE") from failed[0]
        self._core.router.keep([])
        return admin_pb2.FlushPrefixCacheResponse(
            freed_block_count=sum(result for result in freed if isinstance(result, int))
        )

    async def _sequences(self, replica: Replica) -> list[admin_pb2.RequestState]:
        """The sequences of one replica; none if it is lost meanwhile."""
        link = replica.link
        if link is None:
            return []
        try:
            return [_state(sequence, replica.listing.index) for sequence in await link.list_sequences()]
        except PawlError:
            if link.closed.done():
                return []
            raise

    def _load(self) -> admin_pb2.Load:
        replicas = self._core.replicas.all()
        loads = [replica.link.load for replica in replicas if replica.link is not None]
        return admin_pb2.Load(
            sample_time=convert.timestamp(time.time_ns()),
            step=max((load.step for load in loads), default=0),
            running_requests=sum(load.running for load in loads),
            waiting_requests=sum(load.waiting for load in loads),
            waiting_uncached_tokens=sum(load.waiting_tokens for load in loads),
            free_blocks=sum(load.free_blocks for load in loads),
            evictable_blocks=sum(load.cached_blocks for load in loads),
            block_count=sum(load.num_blocks for load in loads),
            workers=[_worker(replica) for replica in replicas],
        )

    def _output_tokens(self) -> int:
        return sum(replica.link.load.output_tokens for replica in self._core.replicas.all() if replica.link)


def _state(sequence: engine_pb2.SequenceState, replica: int) -> admin_pb2.RequestState:
    return admin_pb2.RequestState(
        request_id=sequence.request_id,
        phase=sequence.phase,
        prompt_tokens=sequence.prompt_tokens,
        output_tokens=sequence.output_tokens,
        block_count=sequence.num_blocks,
        age=_duration(sequence.age_s),
        preemption_count=sequence.preemption_count,
        wait_reason=sequence.wait_reason,
        replica=replica,
        user=sequence.user,
        priority=sequence.priority,
        preemption_reason=sequence.preemption_reason,
        lost_tokens=sequence.lost_tokens,
        queue_position=sequence.queue_position,
    )


def _worker(replica: Replica) -> admin_pb2.WorkerLoad:
    listing = replica.listing
    state = _WORKER_STATES.get(listing.state, admin_pb2.WORKER_STATE_LOST)
    if listing.address and replica.link is None:
        state = admin_pb2.WORKER_STATE_LOST
    return admin_pb2.WorkerLoad(
        rank=listing.index,
        address=listing.address,
        state=state,
        used_memory_bytes=replica.link.load.memory_bytes if replica.link else 0,
        restart_count=listing.restart_count,
        silence=_duration(replica.silence_s),
    )


def _without_clocks(load: admin_pb2.Load) -> bytes:
    """What must differ for a report to be news: not the time, nor what moves while nothing happens."""
    copy = admin_pb2.Load()
    copy.CopyFrom(load)
    copy.ClearField("sample_time")
    for worker in copy.workers:
        worker.ClearField("silence")
        worker.ClearField("used_memory_bytes")
    return copy.SerializeToString(deterministic=True)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
