"""Who gives up its blocks when there are not enough. Policy alone; `committer.launch` does it."""

from __future__ import annotations

import numpy as np

from pawl_server.scheduler.slots import IntArray, SlotTable

__all__ = ["by_cost", "protected_row", "victims_in_order"]


def protected_row(slots: SlotTable, rows: IntArray) -> int:
    """The oldest sequence of the highest class: never a victim, so that something always progresses."""
    return int(rows[np.lexsort((slots.order[rows], -slots.level[rows]))[0]])


def by_cost(slots: SlotTable, rows: IntArray) -> list[int]:
    """Rows in the order in which they would be preempted.

    Lowest class first, then the least computed, then the newest. Published blocks count as lost, too: they stay cached
    for a while, but whoever is preempted is so because blocks are short, and then they are the next to be taken.
    """
    computed = slots.computed[rows]
    ordered: list[int] = rows[np.lexsort((-slots.order[rows], computed, slots.level[rows]))].tolist()
    return ordered


def victims_in_order(slots: SlotTable, rows: IntArray) -> list[int]:
    """Rows in the order in which they would be preempted; without the one that never is."""
    if len(rows) == 0:
        return []
    return [row for row in by_cost(slots, rows) if row != protected_row(slots, rows)]
