"""Who gives up its blocks when there are not enough. Policy alone; `committer.launch` does it."""

from __future__ import annotations

import numpy as np

from pawl_server.scheduler.slots import IntArray, SlotTable

__all__ = ["protected_row", "victims_in_order"]


def protected_row(slots: SlotTable, rows: IntArray) -> int:
    """The oldest sequence of the highest class: never a victim, so that something always progresses."""
    return int(rows[np.lexsort((slots.order[rows], -slots.level[rows]))[0]])


def victims_in_order(slots: SlotTable, rows: IntArray) -> list[int]:
    """Rows in the order in which they would be preempted; without the one that never is.

    Lowest class first, then the least to compute again, then the newest. What has to be computed again is what
    was computed, less the published blocks, which stay cached.
    """
    if len(rows) == 0:
        return []
    lost = slots.computed[rows] - slots.published[rows] * slots.block_size
    ordered = rows[np.lexsort((-slots.order[rows], lost, slots.level[rows]))]
    return [row for row in ordered.tolist() if row != protected_row(slots, rows)]
