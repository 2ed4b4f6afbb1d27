"""Who waits, and in which order they are considered.

Highest class first. Inside a class first those who lost their KV (they were admitted and charged before), then the
tenants by the service each has had, and inside a tenant the oldest. Nothing costs more than O(log waiting): entries
that left are dropped when they come up, and all at once when they are the majority.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from pawl_server.scheduler.fairness import TenantAccounts
from pawl_server.scheduler.sequence import SequenceState

__all__ = ["Cursor", "WaitingQueue"]

# (order of arrival, ticket, sequence): valid while the sequence has this ticket.
_Entry = tuple[int, int, SequenceState]

MAX_LEVEL = 10  # ageing lifts nobody above the highest class that may be asked for
_MAX_IDLE_TENANTS = 256


def _clean(heap: list[_Entry]) -> _Entry | None:
    """The first valid entry of a heap; what left before it is dropped."""
    while heap:
        if heap[0][2].ticket == heap[0][1]:
            return heap[0]
        heapq.heappop(heap)
    return None


class _Level:
    """One class."""

    __slots__ = ("ages", "by_service", "resumed", "tenants")

    def __init__(self) -> None:
        self.resumed: list[_Entry] = []
        self.tenants: dict[int, list[_Entry]] = {}
        self.by_service: list[tuple[float, int]] = []  # one entry per tenant of `tenants`; keys may be too small
        self.ages: deque[tuple[float, int, SequenceState]] = deque()  # (since when in this class, ticket, sequence)

    def least_served(self, accounts: TenantAccounts) -> int | None:
        """The waiting tenant with the least service; None when nobody waits."""
        while self.by_service:
            key, tenant = self.by_service[0]
            if _clean(self.tenants[tenant]) is None:
                heapq.heappop(self.by_service)
                del self.tenants[tenant]
            elif key < (service := accounts.service(tenant)):
                heapq.heapreplace(self.by_service, (service, tenant))
            else:
                return tenant
        return None


class WaitingQueue:
    """All waiting sequences of one replica.

    Args:
        accounts: the service of the tenants.
        ageing_s: a sequence that waited so long in its class rises by one; 0 = never.
    """

    def __init__(self, accounts: TenantAccounts, ageing_s: float) -> None:
        self._accounts = accounts
        self._ageing_s = ageing_s
        self._levels: dict[int, _Level] = {}
        self._num_waiting: dict[int, int] = {}  # by tenant
        self._num = 0
        self._num_entries = 0
        self._next_ticket = 0
        self._last_service = 0.0  # of the tenant that was the last to wait
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num

    def push(self, sequence: SequenceState, now: float) -> None:
        """Queue a sequence in its class; one that was admitted before comes before those that were not."""
        tenant = sequence.tenant
        if not self._num_waiting.get(tenant):
            self._accounts.lift(tenant, self._floor())
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        self._num += 1
        self.num_tokens += sequence.num_tokens
        self._enter_level(sequence, now)

    def _enter_level(self, sequence: SequenceState, now: float) -> None:
        level = self._levels.setdefault(sequence.level, _Level())
        sequence.ticket = self._next_ticket
        self._next_ticket += 1
        self._num_entries += 1
        entry = (sequence.order, sequence.ticket, sequence)
        if sequence.charged:
            heapq.heappush(level.resumed, entry)
        else:
            if sequence.tenant not in level.tenants:
                level.tenants[sequence.tenant] = []
                heapq.heappush(level.by_service, (self._accounts.service(sequence.tenant), sequence.tenant))
            heapq.heappush(level.tenants[sequence.tenant], entry)
        if self._ageing_s > 0 and sequence.level < MAX_LEVEL:
            level.ages.append((now, sequence.ticket, sequence))

    def take(self, sequence: SequenceState) -> None:
        """A sequence waits no longer."""
        sequence.ticket = -1
        tenant = sequence.tenant
        self._num -= 1
        self.num_tokens -= sequence.num_tokens
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]
            self._last_service = self._accounts.service(tenant)
        if not self._num:
            self._levels.clear()
            self._num_entries = 0
        elif self._num_entries > 2 * self._num + 64:
            self._compact()

    def lengthen(self, sequence: SequenceState, token_id: int) -> None:
        """A waiting sequence gets a token that was sampled before it lost its KV."""
        sequence.append_late(token_id)
        self.num_tokens += 1

    def _floor(self) -> float:
        """The least service of the tenants that wait; when none does, that of the last who did."""
        waiting = [
            self._accounts.service(tenant)
            for level in self._levels.values()
            if (tenant := level.least_served(self._accounts)) is not None
        ]
        for level in self._levels.values():
            waiting += [
                self._accounts.service(entry[2].tenant) for entry in level.resumed if entry[2].ticket == entry[1]
            ]
        floor = min(waiting, default=self._last_service)
        if len(self._accounts) > len(self._num_waiting) + _MAX_IDLE_TENANTS:
            self._accounts.forget_idle(floor)
        return floor

    def _compact(self) -> None:
        """Drop every entry that left."""
        for number, level in list(self._levels.items()):
            for heap in (level.resumed, *level.tenants.values()):
                heap[:] = [entry for entry in heap if entry[2].ticket == entry[1]]
                heapq.heapify(heap)
            level.ages = deque(entry for entry in level.ages if entry[2].ticket == entry[1])
            level.least_served(self._accounts)
            if not level.resumed and not level.tenants:
                del self._levels[number]
        self._num_entries = self._num

    def promote(self, now: float) -> None:
        """Lift those who waited too long by one class."""
        if self._ageing_s <= 0:
            return
        for number, level in list(self._levels.items()):
            while level.ages:
                since, ticket, sequence = level.ages[0]
                valid = sequence.ticket == ticket
                if valid and now - since < self._ageing_s:
                    break
                level.ages.popleft()
                if valid:
                    sequence.level = number + 1
                    self._enter_level(sequence, now)

    def cursor(self) -> Cursor:
        """Go through the queue without changing it."""
        return Cursor(sorted(self._levels.items(), reverse=True), self._accounts)

    @property
    def top_level(self) -> int:
        """No sequence that waits is of a higher class; the lowest class when nobody waits."""
        return max(self._levels, default=-MAX_LEVEL)

    def head(self) -> SequenceState | None:
        """The sequence that is considered first."""
        with self.cursor() as cursor:
            return next(iter(cursor), None)

    def in_order(self) -> Iterator[SequenceState]:
        """Every waiting sequence, in the order in which it would be considered if nobody were charged."""
        with self.cursor() as cursor:
            yield from cursor


class Cursor:
    """One pass over the queue. What it lifts out of the heaps it puts back when it is closed.

    Charges made on the way count for the order of what follows, and for nothing else.
    """

    def __init__(self, levels: list[tuple[int, _Level]], accounts: TenantAccounts) -> None:
        self._levels = levels
        self._accounts = accounts
        self._extra: dict[int, float] = {}
        self._entries: list[tuple[list[_Entry], _Entry]] = []
        self._tenants: list[tuple[_Level, int]] = []

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        for heap, entry in self._entries:
            heapq.heappush(heap, entry)
        for level, tenant in self._tenants:
            heapq.heappush(level.by_service, (self._accounts.service(tenant), tenant))
        self._entries, self._tenants = [], []

    def charge(self, sequence: SequenceState, cost: float) -> None:
        """The tenant of the sequence that was given last is served so much more."""
        self._extra[sequence.tenant] = self._extra.get(sequence.tenant, 0.0) + cost

    def __iter__(self) -> Iterator[SequenceState]:
        for _, level in self._levels:
            while _clean(level.resumed) is not None:
                yield self._lift(level.resumed)
            opened: list[tuple[float, int]] = []  # tenants come upon, by service with what was charged here
            while (tenant := self._next_tenant(level, opened)) is not None:
                heap = level.tenants[tenant]
                if _clean(heap) is not None:
                    yield self._lift(heap)
                    heapq.heappush(opened, (self._service(tenant), tenant))

    def _lift(self, heap: list[_Entry]) -> SequenceState:
        entry = heapq.heappop(heap)
        self._entries.append((heap, entry))
        return entry[2]

    def _service(self, tenant: int) -> float:
        return self._accounts.service(tenant) + self._extra.get(tenant, 0.0)

    def _next_tenant(self, level: _Level, opened: list[tuple[float, int]]) -> int | None:
        """The tenant with the least service, of those come upon and those not yet."""
        while (fresh := level.least_served(self._accounts)) is not None:
            if opened and opened[0] <= (self._accounts.service(fresh), fresh):
                break
            heapq.heappop(level.by_service)
            self._tenants.append((level, fresh))
            heapq.heappush(opened, (self._service(fresh), fresh))
        return heapq.heappop(opened)[1] if opened else None
