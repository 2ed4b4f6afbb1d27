"""What must hold of the scheduler between any two operations. Tests call it after each; a server may sample it."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pawl_server.kv.block_hash import HashChain, root_hash
from pawl_server.scheduler.admission import blocks_for
from pawl_server.scheduler.sequence import SequenceState, Status
from pawl_server.scheduler.slots import NEVER
from pawl_server.scheduler.state import SchedulerState

__all__ = ["InvariantError", "check_invariants"]


class InvariantError(RuntimeError):
    """The scheduler's tables contradict each other. A defect."""


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise InvariantError(what)


def check_invariants(state: SchedulerState) -> None:
    """Verify blocks, tables, queues and the ledger; `docs/invariants.md` has the list and all checks.

    Raises:
        InvariantError: naming the first thing that does not hold.
        PoolError: the block pool contradicts itself.
    """
    state.pool.check_invariants()
    running = list(state.running.values())
    held = Counter(block for sequence in running for block in sequence.blocks)
    kept_rows = _check_groups(state, held)
    for block in range(1, state.limits.num_blocks + 1):
        _hold(held[block] == state.pool.references(block), f"block {block} is counted otherwise than it is held")
    _hold(len(running) <= state.limits.max_running, "more run than may")
    rows = [sequence.row for sequence in running]
    everywhere = sorted([*rows, *kept_rows, *state.free_rows, *state.rows_to_free])
    _hold(everywhere == list(range(state.limits.max_running)), f"rows are lost or doubled: {everywhere}")
    _hold(sorted(rows) == state.slots.running().tolist(), "the slot table has others than run")
    waiting = list(state.queue.in_order())
    _hold(len(waiting) == len(state.queue), "the counter of waiting sequences is off")
    _hold(sum(s.num_tokens for s in waiting) == state.queue.num_tokens, "the counter of waiting tokens is off")
    places = Counter(id(sequence) for sequence in [*running, *waiting])
    _hold(all(count == 1 for count in places.values()), "a sequence is in two places")
    listed = {id(sequence) for sequence in [*running, *waiting]}
    parked = [sequence for leader in [*running, *waiting] for sequence in leader.followers]
    _hold(len(parked) == state.num_parked, "the counter of parked sequences is off")
    _hold(listed.isdisjoint(map(id, parked)), "a parked sequence waits or runs")
    listed.update(map(id, parked))
    _hold(listed == {id(sequence) for sequence in state.live.values()}, "the live table and the queues differ")
    for sequence in waiting:
        _hold(sequence.status is Status.WAITING, "a waiting sequence says that it does not wait")
        _hold(not sequence.blocks and sequence.row < 0, "a waiting sequence holds KV")
        _hold(sequence.bypassed <= state.limits.max_bypass, "a sequence was overtaken more often than may be")
    for sequence in running:
        _check_running(state, sequence)
    for sequence in [*waiting, *running]:
        _hold(sequence.preemptions <= state.limits.max_preemptions, "a sequence was preempted more often than may be")
        _hold(sequence.level >= sequence.request.priority, "a sequence fell below its class")
    _check_ledger(state)
    launched = {entry.step for entry in state.ledger}
    _hold(state.pool.pending_steps() <= launched, "a block is announced by a step that is not in flight")
    _check_sharing(state)
    _check_names(state)


def _check_groups(state: SchedulerState, held: Counter[int]) -> list[int]:
    """Parked sequences have a row and a block kept for each while their leader runs; counts the blocks as held."""
    kept_rows: list[int] = []
    leaders = {order for order, sequence in state.running.items() if sequence.followers}
    _hold(leaders == set(state.leaders), "a running sequence has others parked behind it, or is said to")
    for sequence in state.live.values():
        group = sequence.group
        if group is None or not sequence.followers:
            continue
        number = len(group.parked) if sequence.status is Status.RUNNING else 0
        _hold(len(group.rows) == len(group.blocks) == number, "not one row and one block is kept for each")
        _hold(not sequence.num_output, "others are still parked behind one that has output")
        for follower in group.parked:
            _hold(follower.status is Status.PARKED and follower.row < 0, "a parked sequence says that it is not")
            _hold(follower.group is group and not follower.blocks, "a parked sequence holds KV")
        held.update(group.blocks)
        kept_rows += group.rows
    return kept_rows


def _check_running(state: SchedulerState, sequence: SequenceState) -> None:
    slots, size = state.slots, state.limits.block_size
    _hold(sequence.status is Status.RUNNING, "a running sequence says that it does not run")
    _hold(slots.owner(sequence.row) is sequence, "a row belongs to another sequence")
    reach = sequence.num_computed + sequence.num_in_flight
    forked = sequence.group is not None and reach == sequence.num_prompt - 1  # it holds the block of its next token
    drafts = state.limits.max_drafts and state.limits.max_drafts + 1  # and the token before them, if the row is unsure
    least, most = blocks_for(reach, size), blocks_for(reach + max(forked, drafts), size)
    _hold(least <= len(sequence.blocks) <= most, "a table is longer or shorter than its tokens and drafts")
    _hold(slots.capacity[sequence.row] == len(sequence.blocks) * size, "the capacity of a row is off")
    _hold(len(sequence.tokens) == sequence.num_tokens <= sequence.limit, "there are more tokens than allowed")
    known = int(slots.expected[sequence.row]) + _drafts_in_flight(state, sequence)
    _hold(
        reach <= known and slots.expected[sequence.row] <= sequence.limit, "computed and known tokens are out of order"
    )
    _hold(reach <= sequence.limit, "drafts reach beyond the sequence's limit")
    published = int(slots.published[sequence.row])
    _hold(published * size <= sequence.num_computed, "a block is published before it is computed")
    publish_at = (published + 1) * size if sequence.chain is not None else NEVER
    _hold(slots.publish_at[sequence.row] == publish_at, "the next block is published at another length")


def _drafts_in_flight(state: SchedulerState, sequence: SequenceState) -> int:
    """Tokens of a sequence in flight that are drafts; nothing stands after them."""
    steps = [entry for entry in state.ledger if entry.holds(sequence.row, state.slots)]
    open_ended = [sequence.row in entry.drafts for entry in steps]
    _hold(not any(open_ended[:-1]), "a step computes on from tokens that are not known")
    drafts = sum(entry.drafts.get(sequence.row, 0) for entry in steps)
    _hold(drafts <= state.limits.max_drafts, "a sequence has more drafts than it may")
    return drafts


def _check_ledger(state: SchedulerState) -> None:
    """What is in flight is what the ledger says, and nothing is owed to one who is not in it."""
    slots = state.slots
    tokens, samples = np.zeros_like(slots.planned), np.zeros_like(slots.planned)
    owed: Counter[int] = Counter()
    for entry in state.ledger:
        alive = entry.alive(slots)
        _hold(entry.epoch == state.epoch, "a ledger entry outlived its worker")
        _hold(not alive[np.isin(entry.rows, list(entry.stale))].any(), "a sequence is in flight and stale at once")
        np.add.at(tokens, entry.rows[alive], entry.num_tokens[alive])
        np.add.at(samples, entry.rows[alive], entry.num_samples[alive])
        owed.update(id(sequence) for sequence in entry.stale.values())
    _hold((slots.planned - slots.computed == tokens).all(), "tokens in flight are not those of the ledger")
    _hold((slots.expected - slots.length == samples).all(), "samples in flight are not those of the ledger")
    for sequence in state.live.values():
        _hold(sequence.num_stale == owed[id(sequence)], "a sequence waits for tokens that nobody computes")


def _check_names(state: SchedulerState) -> None:
    """What is published of a running sequence's blocks is named by its known tokens, made anew from the root."""
    size = state.limits.block_size
    for sequence in state.running.values():
        tokens = sequence.tokens
        chain = HashChain(root_hash(state.root, sequence.request.cache_key), size)
        chain.extend(tokens, len(tokens) // size)
        for index, block in enumerate(sequence.blocks):
            name = state.pool.name_of(block)
            if name is not None:
                _hold(index < len(chain) and chain[index] == name, f"block {block} has a name that is not its tokens'")
                _hold(sequence.chain is not None, f"block {block} is published against its request")


def _check_sharing(state: SchedulerState) -> None:
    """A block is shared only at one index, when full and computed or announced, by equal prefixes of one namespace.

    None is written any more: those who fork take over what a launched step completes.
    """
    holders: dict[int, tuple[int, bytes, list[int]]] = {}
    size = state.limits.block_size
    lent = {block for entry in state.ledger for _, sequence in entry.forks for block in sequence.blocks}
    for sequence in state.running.values():
        num_final = (sequence.num_computed + sequence.num_in_flight) // size
        for index, block in enumerate(sequence.blocks):
            if state.pool.references(block) < 2:
                continue
            prefix = sequence.tokens[: (index + 1) * size].tolist()
            mine = (index, sequence.request.cache_key, prefix)
            _hold(holders.setdefault(block, mine) == mine, f"block {block} is shared by different prefixes")
            _hold(index < num_final, f"block {block} is shared and still to be written")
            there = index < sequence.num_computed // size or state.pool.is_pending(block) or block in lent
            _hold(there, f"block {block} is shared before it is computed or announced")
