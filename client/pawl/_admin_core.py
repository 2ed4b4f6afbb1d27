"""The admin calls as plain values, for both admin clients.

Owns what an operator's call sends and how its answer is read. Does no I/O.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pawl import _build, _convert, _methods
from pawl._admin_types import Load, RequestState, ServerInfo, WorkerLoad, WorkerState
from pawl._core import Call, make_call
from pawl._options import Settings
from pawl._retry import Retry
from pawl.v1 import admin_pb2

__all__ = ["drain", "flush_prefix_cache", "list_requests", "server_info", "watch_load"]

# What a drain may take beyond its grace period: cancelling what is left.
_DRAIN_MARGIN_S = 60.0
_MAX_GRACE_S = 3600.0
_PAGE_SIZE = 1000

_WORKER_STATES = {
    admin_pb2.WORKER_STATE_STARTING: WorkerState.STARTING,
    admin_pb2.WORKER_STATE_READY: WorkerState.READY,
    admin_pb2.WORKER_STATE_LOST: WorkerState.LOST,
    admin_pb2.WORKER_STATE_RESTARTING: WorkerState.RESTARTING,
}


def _server_info(message: admin_pb2.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=message.version,
        instance_id=message.instance_id,
        started=_convert.instant(message.start_time),
        block_size=message.block_size,
        block_count=message.block_count,
        max_running_requests=message.max_running_requests,
        max_batch_tokens=message.max_batch_tokens,
        max_queued_requests=message.max_queued_requests,
        tensor_parallel_size=message.tensor_parallel_size,
        replica_count=message.replica_count,
        config=dict(message.config),
    )


def _worker(message: admin_pb2.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        rank=message.rank,
        address=message.address,
        state=_WORKER_STATES.get(message.state, WorkerState.UNKNOWN),
        used_memory_bytes=message.used_memory_bytes,
        restart_count=message.restart_count,
        silence=_convert.seconds(message.silence),
    )


def _load(response: admin_pb2.WatchLoadResponse) -> Load:
    message = response.load
    return Load(
        sampled=_convert.instant(message.sample_time),
        step=message.step,
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        waiting_uncached_tokens=message.waiting_uncached_tokens,
        free_blocks=message.free_blocks,
        evictable_blocks=message.evictable_blocks,
        block_count=message.block_count,
        output_tokens_per_second=message.output_tokens_per_second,
        workers=tuple(_worker(worker) for worker in message.workers),
    )


def _request_state(message: admin_pb2.RequestState) -> RequestState:
    return RequestState(
        request_id=message.request_id,
        phase=message.phase,
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        block_count=message.block_count,
        age=_convert.seconds(message.age),
        preemption_count=message.preemption_count,
        wait_reason=message.wait_reason,
        replica=message.replica,
        user=message.user,
        priority=message.priority,
        preemption_reason=message.preemption_reason,
        lost_tokens=message.lost_tokens,
        queue_position=message.queue_position,
    )


def server_info(settings: Settings) -> Call[admin_pb2.GetServerInfoResponse, ServerInfo]:
    """Static facts."""
    return make_call(settings, _methods.GET_SERVER_INFO, admin_pb2.GetServerInfoRequest(), _server_info)


def watch_load(settings: Settings, min_interval: float) -> Call[admin_pb2.WatchLoadResponse, Load]:
    """Load reports, without a time limit."""
    request = admin_pb2.WatchLoadRequest(min_interval=_build.duration(min_interval, "min_interval"))
    return make_call(settings, _methods.WATCH_LOAD, request, _load, math.inf)


def list_requests(
    settings: Settings, page_token: str
) -> Call[admin_pb2.ListRequestsResponse, tuple[list[RequestState], str]]:
    """A page of live requests, and the token of the next one."""

    def convert(answer: admin_pb2.ListRequestsResponse) -> tuple[list[RequestState], str]:
        return [_request_state(state) for state in answer.requests], answer.next_page_token

    request = admin_pb2.ListRequestsRequest(page_size=_PAGE_SIZE, page_token=page_token)
    return make_call(settings, _methods.LIST_REQUESTS, request, convert)


def drain(settings: Settings, grace: float | None) -> Call[admin_pb2.DrainResponse, int]:
    """Stop taking requests. Never tried again: the server may go away as soon as it has answered."""

    def convert(answer: admin_pb2.DrainResponse) -> int:
        return answer.cancelled_request_count

    request = admin_pb2.DrainRequest()
    if grace is not None:
        request.grace_period.CopyFrom(_build.duration(grace, "grace_period"))
    timeout = (_MAX_GRACE_S if grace is None else grace) + _DRAIN_MARGIN_S
    return replace(make_call(settings, _methods.DRAIN, request, convert, timeout), retry=Retry(retries=0))


def flush_prefix_cache(settings: Settings) -> Call[admin_pb2.FlushPrefixCacheResponse, int]:
    """Empty the prefix caches."""

    def convert(answer: admin_pb2.FlushPrefixCacheResponse) -> int:
        return answer.freed_block_count

    return make_call(settings, _methods.FLUSH_PREFIX_CACHE, admin_pb2.FlushPrefixCacheRequest(), convert)
