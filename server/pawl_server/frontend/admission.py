"""Who may come in: the bounded queue, the limits of a tenant, and the table of live and recent request ids.

Owns the counts and the word on when to come back; refuses before any work is done and never sheds what it let
in. Knows nothing of engines.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from pawl.errors import AlreadyExists, Overloaded, Unavailable
from pawl.v1 import inference_pb2
from pawl_server.frontend.auth import Principal

__all__ = ["Admission", "Bucket", "Ticket"]

log = logging.getLogger(__name__)

_NUM_RECENT = 8192  # finished ids kept for Cancel
_NUM_DEPARTURES = 64  # over which the drain rate is measured
_RETRY_S = (0.1, 30.0)  # bounds of retry-after
_TELL_EVERY_S = 60.0  # of one tenant and reason, to the log

CancelOutcome = inference_pb2.CancelOutcome


class Bucket:
    """A token bucket that holds a minute's worth and may fall below zero when a cost is known late."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._capacity = float(per_minute)
        self._level = self._capacity
        self._filled = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` (at most the capacity counts) is there; 0 = now."""
        self._level = min(self._capacity, self._level + (now - self._filled) * self._capacity / 60)
        self._filled = now
        missing = min(amount, self._capacity) - self._level
        return max(0.0, missing * 60 / self._capacity)

    def take(self, amount: float) -> None:
        """Take; what is missing is paid back by waiting."""
        self._level -= amount


class _Tenant:
    """Counts of one tenant."""

    def __init__(self, principal: Principal, now: float) -> None:
        self.limits = principal
        self.num_live = 0
        self.requests = Bucket(principal.requests_per_minute, now) if principal.requests_per_minute else None
        self.tokens = Bucket(principal.tokens_per_minute, now) if principal.tokens_per_minute else None


class Ticket:
    """One admitted request. Close it exactly when the request ends; closing twice is harmless."""

    __slots__ = ("_admission", "_closed", "_on_cancel", "_queued", "_tenant", "cancelled", "principal", "request_id")

    def __init__(self, admission: Admission, tenant: _Tenant, principal: Principal, request_id: str) -> None:
        self._admission = admission
        self._tenant = tenant
        self.principal = principal
        self.request_id = request_id
        self._queued = True
        self._closed = False
        self._on_cancel: Callable[[], None] | None = None
        self.cancelled = False

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call back when the request is cancelled; at once if it was already."""
        self._on_cancel = callback
        if self.cancelled:
            callback()

    def cancel(self) -> None:
        """Ask that the request end with FINISH_REASON_CANCELLED."""
        if not self.cancelled:
            self.cancelled = True
            if self._on_cancel is not None:
                self._on_cancel()

    def charge(self, num_tokens: int) -> None:
        """Count tokens against the tenant's rate; what is over the limit delays his next request."""
        if self._tenant.tokens is not None:
            self._tenant.tokens.take(num_tokens)

    def first_token(self) -> None:
        """The request has left the queue."""
        if self._queued:
            self._queued = False
            self._admission.left_queue(served=True)

    def retry_after(self) -> float:
        """Seconds after which the request may come back, if it fails for no fault of its own."""
        return self._admission.retry_after()

    def close(self) -> None:
        """The request has ended."""
        if self._closed:
            return
        self._closed = True
        if self._queued:
            self._queued = False
            self._admission.left_queue(served=False)
        self._tenant.num_live -= 1
        self._admission.forget(self)


class _Refusals:
    """Tells the log who is refused and why, each at most once a minute. Bounded by the key file's tenants."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._untold: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, str], float] = {}

    def add(self, tenant: str, reason: str) -> None:
        """One more."""
        key, now = (tenant, reason), self._clock()
        self._untold[key] = self._untold.get(key, 0) + 1
        if now - self._told.get(key, -_TELL_EVERY_S) < _TELL_EVERY_S:
            return
        log.warning(
            "tenant %r: %d requests refused since this was last said: %s", tenant, self._untold.pop(key), reason
        )
        self._told[key] = now


class Admission:
    """Lets requests in, or says when to come back.

    Args:
        max_queued: most admitted requests without a first token.
        clock: monotonic seconds.
        on_change: told (queued, live) after every change, for gauges.
    """

    def __init__(
        self,
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[int, int], None] = lambda _queued, _live: None,
    ) -> None:
        self._max_queued = max_queued
        self._clock = clock
        self._on_change = on_change
        self._live: dict[tuple[str, str], Ticket] = {}
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self._departures: deque[float] = deque(maxlen=_NUM_DEPARTURES)
        self._refusals = _Refusals(clock)
        self.num_queued = 0
        self.draining = False

    @property
    def num_live(self) -> int:
        """Admitted requests that have not ended."""
        return len(self._live)

    def live(self) -> Iterator[Ticket]:
        """The admitted requests that have not ended."""
        return iter(list(self._live.values()))

    def admit(self, principal: Principal, request_id: str) -> Ticket:
        """Let a request in.

        Raises:
            Unavailable: the server drains.
            AlreadyExists: a live request of the same tenant has the id.
            Overloaded: the queue is full, or a limit of the tenant is reached.
        """
        if self.draining:
            raise Unavailable("the server is draining: use another", reason="DRAINING", retry_after=1.0)
        if (principal.tenant, request_id) in self._live:
            raise AlreadyExists(f"request id {request_id!r} belongs to a live request: choose another")
        tenant = self._tenant(principal)
        try:
            self._check_queue()
            self._check_limits(tenant, principal)
        except Overloaded as error:
            self._refusals.add(principal.tenant, error.reason)
            raise
        if tenant.requests is not None:
            tenant.requests.take(1)
        tenant.num_live += 1
        ticket = Ticket(self, tenant, principal, request_id)
        self._live[principal.tenant, request_id] = ticket
        self.num_queued += 1
        self._on_change(self.num_queued, len(self._live))
        return ticket

    def count(self, principal: Principal) -> None:
        """Let a call in that no engine works on: it counts as a request of the tenant, and for nothing else.

        Raises:
            Overloaded: the tenant has no more requests in this minute.
        """
        tenant = self._tenant(principal)
        if tenant.requests is None:
            return
        wait_s = tenant.requests.wait_s(1, self._clock())
        if wait_s > 0:
            self._refusals.add(principal.tenant, "REQUEST_RATE")
            raise _over(principal, "REQUEST_RATE", principal.requests_per_minute, "requests per minute", wait_s)
        tenant.requests.take(1)

    def cancel(self, tenant: str, request_id: str) -> CancelOutcome.ValueType:
        """Cancel one request of a tenant; says what became of it."""
        ticket = self._live.get((tenant, request_id))
        if ticket is not None:
            ticket.cancel()
            return inference_pb2.CANCEL_OUTCOME_CANCELLED
        if (tenant, request_id) in self._recent:
            return inference_pb2.CANCEL_OUTCOME_ALREADY_FINISHED
        return inference_pb2.CANCEL_OUTCOME_NOT_FOUND

    def retry_after(self) -> float:
        """Seconds until a place in the queue should be free, from the rate of first tokens."""
        low, high = _RETRY_S
        if len(self._departures) < 2:
            return 1.0
        spent = max(self._clock() - self._departures[0], 1e-3)
        missing = self.num_queued - self._max_queued + 1
        return min(max(missing * spent / len(self._departures), low), high)

    def left_queue(self, *, served: bool) -> None:
        """A request got its first token, or ended without one. Called by tickets."""
        self.num_queued -= 1
        if served:
            self._departures.append(self._clock())
        self._on_change(self.num_queued, len(self._live))

    def forget(self, ticket: Ticket) -> None:
        """A request ended; its id is remembered for Cancel. Called by tickets."""
        key = (ticket.principal.tenant, ticket.request_id)
        del self._live[key]
        self._recent[key] = None
        self._recent.move_to_end(key)
        while len(self._recent) > _NUM_RECENT:
            self._recent.popitem(last=False)
        self._on_change(self.num_queued, len(self._live))

    def _tenant(self, principal: Principal) -> _Tenant:
        """The counts of a tenant; new buckets when the key file gave him other limits. Bounded by the key file."""
        known = self._tenants.get(principal.tenant)
        rates = (principal.requests_per_minute, principal.tokens_per_minute)
        if known is not None and (known.limits.requests_per_minute, known.limits.tokens_per_minute) == rates:
            return known
        fresh = _Tenant(principal, self._clock())
        if known is not None:
            known.limits = principal
            known.requests, known.tokens = fresh.requests, fresh.tokens
            return known
        self._tenants[principal.tenant] = fresh
        return fresh

    def _check_queue(self) -> None:
        if self.num_queued >= self._max_queued:
            raise Overloaded(
                f"{self.num_queued} requests wait for their first token, at most {self._max_queued} may",
                reason="QUEUE_FULL",
                retry_after=self.retry_after(),
                metadata={"queued_requests": str(self.num_queued), "max_queued_requests": str(self._max_queued)},
            )

    def _check_limits(self, tenant: _Tenant, principal: Principal) -> None:
        now = self._clock()
        waits = [
            (bucket.wait_s(1, now), reason, number, what)
            for bucket, reason, number, what in (
                (tenant.requests, "REQUEST_RATE", principal.requests_per_minute, "requests per minute"),
                (tenant.tokens, "TOKEN_RATE", principal.tokens_per_minute, "tokens per minute"),
            )
            if bucket is not None
        ]
        if principal.max_concurrent and tenant.num_live >= principal.max_concurrent:
            waits.append((self.retry_after(), "CONCURRENCY", principal.max_concurrent, "requests at once"))
        for wait_s, reason, number, what in waits:
            if wait_s > 0:
                raise _over(principal, reason, number, what, wait_s)


def _over(principal: Principal, reason: str, number: int, what: str, wait_s: float) -> Overloaded:
    """The error of a tenant who is at one of his limits."""
    return Overloaded(
        f"tenant {principal.tenant!r} may have {number} {what}",
        reason=reason,
        retry_after=max(wait_s, _RETRY_S[0]),
        metadata={"subject": f"tenant:{principal.tenant}", "limit": str(number)},
    )
