"""What an operator sees of a server: frozen plain data, times in seconds.

Owns the shapes that the admin clients give; knows nothing of messages on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

__all__ = ["Load", "RequestState", "ServerInfo", "WorkerLoad", "WorkerState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """Static facts of a front end and the replicas that it knows. Secrets in `config` are redacted."""

    version: str
    instance_id: str
    started: datetime | None
    block_size: int
    block_count: int
    max_running_requests: int
    max_batch_tokens: int
    max_queued_requests: int
    tensor_parallel_size: int
    replica_count: int
    config: Mapping[str, str]


class WorkerState(StrEnum):
    """State of a replica's process."""

    UNKNOWN = "unknown"
    STARTING = "starting"
    READY = "ready"
    LOST = "lost"
    RESTARTING = "restarting"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """One replica; `silence` is the time since its last report."""

    rank: int
    address: str
    state: WorkerState
    used_memory_bytes: int
    restart_count: int
    silence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the server is busy with, summed over its replicas."""

    sampled: datetime | None
    step: int
    running_requests: int
    waiting_requests: int
    waiting_uncached_tokens: int
    free_blocks: int
    evictable_blocks: int
    block_count: int
    output_tokens_per_second: float
    workers: tuple[WorkerLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
    """One live request.

    Attributes:
        phase: "waiting", "prefill", "decode" or "preempted".
        age: seconds since it arrived at the engine.
        wait_reason: why it waits: a word such as "blocks" or "slots", a colon and the numbers; empty while it runs.
        replica: number of the replica that it is on.
        user: the caller's label of an end user.
        preemption_reason: why it was preempted last, with the numbers; empty if it never was.
        lost_tokens: tokens to be computed again because of preemptions.
        queue_position: its place among those that wait on its replica, 1 = next; 0 while it runs.
    """

    request_id: str
    phase: str
    prompt_tokens: int
    output_tokens: int
    block_count: int
    age: float
    preemption_count: int
    wait_reason: str
    replica: int
    user: str
    priority: int
    preemption_reason: str = ""
    lost_tokens: int = 0
    queue_position: int = 0
