"""Whether the books of a block pool agree: references, owners, rings, names and marks, each kept by another part.

What one part can say of itself it checks itself; here is what only two of them together can contradict.
"""

from __future__ import annotations

from collections.abc import Sequence

from pawl_server.kv.eviction import PLAIN, EvictionOrder, Tenant
from pawl_server.kv.prefix_index import PrefixIndex
from pawl_server.kv.retention import Retention

__all__ = ["contradiction"]


def contradiction(
    references: Sequence[int],
    owners: Sequence[Tenant | None],
    order: EvictionOrder,
    index: PrefixIndex,
    retention: Retention,
) -> str | None:
    """Look at every block and every tenant. O(blocks * tenants).

    Args:
        references: of each block, the null block included.
        owners: of each block; None of those without a name.
        order: the free blocks.
        index: the names of blocks.
        retention: the blocks that are to be kept.

    Returns:
        The first thing that does not hold, None when there is none.
    """
    if references[PLAIN] or index.name_of(PLAIN) is not None:
        return "the null block is in use"
    for block in range(1, len(references)):
        ring, owner, name = order.ring_of(block), owners[block], index.name_of(block)
        if references[block] < 0 or (references[block] == 0) != (ring is not None):
            return f"block {block} has {references[block]} references, free: {ring is not None}"
        if (owner is None) != (name is None):
            return f"block {block} has a name and no owner, or an owner and no name"
        if block in retention and name is None:
            return f"block {block} is to be kept and holds nothing"
        wanted = PLAIN if owner is None else order.retained if block in retention else owner.ring
        if ring not in (None, wanted):
            return f"block {block} is in ring {ring}, not in {wanted}"
        if ring is not None and index.is_pending(block):
            return f"block {block} is free and still to be computed"
    return _tenants_contradict(owners, order, retention)


def _tenants_contradict(owners: Sequence[Tenant | None], order: EvictionOrder, retention: Retention) -> str | None:
    named = [owner for owner in owners if owner is not None]
    for tenant in order.tenants():
        if sum(owner is tenant for owner in named) != tenant.num_published:
            return f"tenant {tenant.name!r} owns other than {tenant.num_published} blocks"
        marked = sum(owner is tenant and block in retention for block, owner in enumerate(owners))
        if marked != tenant.num_retained:
            return f"tenant {tenant.name!r} has {marked} blocks kept, the counter says {tenant.num_retained}"
    if any(owner not in order.tenants() for owner in named):
        return "a block belongs to a tenant that is gone"
    if len(retention) > retention.budget:
        return f"{len(retention)} blocks are kept, {retention.budget} may be"
    return None
