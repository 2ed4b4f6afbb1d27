"""Events: numbered, bounded, and the same after JSON."""

from __future__ import annotations

import asyncio

import pytest

from pawl_server.engine.spec import EngineProgress
from pawl_server.fleet.replicas import (
    EventBatch,
    EventLog,
    ReplicaChanged,
    ReplicaProgress,
    ReplicaState,
    ReplicaStatus,
    decode_batch,
    encode_batch,
)
from pawl_server.internal.v1 import fleet_pb2


def changed(index: int) -> ReplicaChanged:
    return ReplicaChanged(status=ReplicaStatus(index=index))


async def test_a_reader_gets_every_event_once() -> None:
    log = EventLog()
    log.append(changed(0))
    first = await log.after(0, timeout_s=0.0)
    log.append(changed(1))
    log.append(changed(2))
    second = await log.after(first.next_number, timeout_s=0.0)
    third = await log.after(second.next_number, timeout_s=0.0)
    assert [len(batch.events) for batch in (first, second, third)] == [1, 2, 0]
    assert third.next_number == 3


async def test_a_waiting_reader_wakes() -> None:
    log = EventLog()
    waiting = asyncio.create_task(log.after(0, timeout_s=30.0))
    await asyncio.sleep(0)
    log.append(changed(7))
    assert (await waiting).events == [changed(7)]


async def test_a_reader_that_falls_behind_misses_the_oldest_alone() -> None:
    log = EventLog(capacity=2)
    for index in range(5):
        log.append(changed(index))
    batch = await log.after(1, timeout_s=0.0)
    assert batch.events == [changed(3), changed(4)]
    assert batch.next_number == 5


async def test_a_number_of_an_earlier_log_reads_from_the_beginning() -> None:
    log = EventLog()
    log.append(changed(0))
    assert (await log.after(99, timeout_s=0.0)).events == [changed(0)]


def test_batches_survive_json() -> None:
    progress = EngineProgress(step="memory", done=1, total=1, facts={"num_blocks": 3})
    status = ReplicaStatus(index=1, incarnation=2, state=ReplicaState.BACKOFF, detail="died")
    batch = EventBatch(
        next_number=9,
        events=[
            ReplicaProgress(replica=1, incarnation=2, progress=progress),
            ReplicaChanged(status=status, restart_reason="died", gives_up=True),
        ],
    )
    assert decode_batch(encode_batch(batch)) == batch


@pytest.mark.parametrize("state", list(ReplicaState))
def test_every_state_has_its_word_on_the_wire(state: ReplicaState) -> None:
    message = ReplicaStatus(index=3, incarnation=4, state=state, address="a:1").to_proto()
    assert fleet_pb2.ReplicaState.Name(message.state) == f"REPLICA_STATE_{state.value}"
    assert (message.index, message.incarnation, message.address) == (3, 4, "a:1")
