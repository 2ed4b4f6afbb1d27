"""Several samples of one prompt: one computes it, the others are parked until it is computed, then fork from it.

All of a group start together: when the first is admitted, a row and a block is kept for each of the others. In the
step that computes the last token of the prompt they take over its full blocks, and the worker copies the one that is
not full. They compute that last token again, each for itself, and so draw their first token as a request alone does;
from then on nothing ties them together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pawl_server.kv.draft import BlockDraft

if TYPE_CHECKING:
    from pawl_server.scheduler.sequence import SequenceState

__all__ = ["Fork", "SampleGroup", "fork_group"]


class SampleGroup:
    """The samples of one request.

    Attributes:
        handles: of all of them.
        leader: the one that computes the prompt, while others are parked.
        parked: those that have not begun, in their order.
        rows: kept for those that are parked, one each, while the leader runs; else empty.
        blocks: kept in the same way.
    """

    __slots__ = ("blocks", "handles", "leader", "parked", "rows")

    def __init__(self, leader: SequenceState, handles: Sequence[Hashable]) -> None:
        self.handles = tuple(handles)
        self.leader = leader
        self.parked: list[SequenceState] = []
        self.rows: list[int] = []
        self.blocks: list[int] = []

    def forget_kept(self) -> None:
        """The leader runs no more: nothing is kept. Whoever calls this has given rows and blocks back."""
        self.rows, self.blocks = [], []


@dataclass(frozen=True, slots=True)
class Fork:
    """A parked sequence that takes over the prompt which a step completes, and its row and blocks."""

    sequence: SequenceState
    leader: SequenceState
    row: int
    blocks: list[int]


def fork_group(
    draft: BlockDraft,
    leader: SequenceState,
    blocks: Sequence[int],
    rows: Sequence[int],
    own_blocks: Sequence[int],
    block_size: int,
) -> list[Fork]:
    """Fork all that are parked behind a sequence with these blocks into the rows and blocks that are kept for them."""
    return [
        Fork(follower, leader, row, draft.fork(blocks, follower.num_prompt - 1, block_size, own))
        for follower, row, own in zip(leader.followers, rows, own_blocks, strict=True)
    ]
