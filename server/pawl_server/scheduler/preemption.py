"""Who gives up its blocks when there are not enough. Policy alone; `committer.launch` does it."""

from __future__ import annotations

from collections.abc import Collection

from pawl_server.kv.block_pool import BlockPool
from pawl_server.scheduler.sequence import SequenceState

__all__ = ["choose_victim", "protected"]


def protected(running: Collection[SequenceState]) -> SequenceState:
    """The oldest sequence of the highest class: never a victim, so that something always progresses."""
    return min(running, key=lambda sequence: (-sequence.request.priority, sequence.order))


def choose_victim(running: Collection[SequenceState], pool: BlockPool) -> SequenceState | None:
    """Lowest class first, then the least to compute again, then the newest; None when only one is left.

    What has to be computed again is what was computed, less the published blocks that stay cached.
    """
    if not running:
        return None
    keep = protected(running)

    def cost(sequence: SequenceState) -> tuple[int, int, int]:
        unpublished = sum(pool.hash_of(block) is None for block in sequence.blocks)
        return (sequence.request.priority, unpublished, -sequence.order)

    return min((sequence for sequence in running if sequence is not keep), key=cost, default=None)
