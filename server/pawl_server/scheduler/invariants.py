"""What must hold of the scheduler between any two operations. Tests call it after each; a server may sample it."""

from __future__ import annotations

from collections import Counter

from pawl_server.scheduler.admission import blocks_for
from pawl_server.scheduler.sequence import Status
from pawl_server.scheduler.state import SchedulerState

__all__ = ["InvariantError", "check_invariants"]


class InvariantError(RuntimeError):
    """The scheduler's tables contradict each other. A defect."""


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise InvariantError(what)


def check_invariants(state: SchedulerState) -> None:
    """Verify blocks, tables, queues and the ledger (numbers 1-7, 10, 12, 19-21 of the design's list).

    Raises:
        InvariantError: naming the first thing that does not hold.
        PoolError: the block pool contradicts itself.
    """
    state.pool.check_invariants()
    running = list(state.running.values())
    held = Counter(block for sequence in running for block in sequence.blocks)
    for block in range(1, state.limits.num_blocks + 1):
        _hold(held[block] == state.pool.references(block), f"block {block} is counted otherwise than it is held")
    _hold(len(running) <= state.limits.max_running, "more run than may")
    rows = [sequence.row for sequence in running]
    everywhere = sorted([*rows, *state.free_rows, *state.rows_to_free])
    _hold(everywhere == list(range(state.limits.max_running)), f"rows are lost or doubled: {everywhere}")
    waiting = list(state.waiting_in_order())
    _hold(len(waiting) == state.num_waiting, "the counter of waiting sequences is off")
    places = Counter(id(sequence) for sequence in [*running, *waiting])
    _hold(all(count == 1 for count in places.values()), "a sequence is in two places")
    listed = {id(sequence) for sequence in [*running, *waiting] if not sequence.discarded}
    _hold(listed == {id(sequence) for sequence in state.live.values()}, "the live table and the queues differ")
    for sequence in waiting:
        _hold(not sequence.blocks and not sequence.ledger and not sequence.num_computed, "a waiting sequence holds KV")
    for sequence in running:
        size = state.limits.block_size
        _hold(sequence.status is Status.RUNNING, "a running sequence says that it does not run")
        reach = sequence.num_computed + sequence.num_in_flight
        _hold(len(sequence.blocks) == blocks_for(reach, size), "a table is longer or shorter than its tokens")
        _hold(reach <= len(sequence.tokens) <= sequence.limit, "computed, known and allowed tokens are out of order")
        _hold(sequence.num_published <= sequence.num_computed // size, "a block is published before it is computed")
        _hold(all(entry.epoch == sequence.epoch for entry in sequence.ledger), "a ledger entry outlived its KV")
    _check_sharing(state)


def _check_sharing(state: SchedulerState) -> None:
    """A block is shared only at one index, when full and computed, by equal prefixes of equal namespaces."""
    holders: dict[int, tuple[int, bytes, list[int]]] = {}
    size = state.limits.block_size
    for sequence in state.running.values():
        for index, block in enumerate(sequence.blocks):
            if state.pool.references(block) < 2:
                continue
            prefix = sequence.tokens[: (index + 1) * size].tolist()
            mine = (index, sequence.request.cache_key, prefix)
            _hold(holders.setdefault(block, mine) == mine, f"block {block} is shared by different prefixes")
            _hold(index < sequence.num_computed // size, f"block {block} is shared before it is computed")
