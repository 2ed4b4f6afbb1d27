"""The waiting queue against a list that is sorted afresh whenever it is asked."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pawl_server.scheduler.fairness import Prices, TenantAccounts
from pawl_server.scheduler.queues import WaitingQueue
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState
from pawl_server.scheduler.slots import SlotTable
from pawl_workers.plan import SamplingSpec

AGEING_S = 10.0


class QueueMachine(RuleBasedStateMachine):
    """Arrivals, departures, charges, time."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = TenantAccounts(Prices())
        self.queue = WaitingQueue(self.accounts, AGEING_S)
        self.slots = SlotTable(1, 16)
        self.now = 0.0
        self.num = 0
        self.waiting: list[SequenceState] = []
        self.entered: dict[int, float] = {}
        self.service: dict[str, float] = {}

    def _name(self, sequence: SequenceState) -> str:
        return sequence.request.tenant

    @rule(tenant=st.sampled_from("abcd"), priority=st.integers(-1, 2), resumed=st.booleans())
    def push(self, tenant: str, priority: int, resumed: bool) -> None:
        """A sequence arrives, or comes back after it lost its KV."""
        request = SequenceRequest(
            handle=self.num, request_id="", prompt_ids=[1] * (1 + self.num % 3), sampling=SamplingSpec(),
            max_output_tokens=1, cache_key=b"", priority=priority, tenant=tenant,
        )  # fmt: skip
        sequence = SequenceState(
            request, self.slots, order=self.num, tenant=self.accounts.enter(tenant, 1.0), limit=9, chain=None, now=0.0
        )
        sequence.charged = resumed
        if tenant not in map(self._name, self.waiting):
            least = min((self.service[self._name(s)] for s in self.waiting), default=None)
            self.service[tenant] = max(self.service.get(tenant, 0.0), 0.0 if least is None else least)
        self.num += 1
        self.queue.push(sequence, self.now)
        if len(self.waiting) == 0:
            self.service[tenant] = self.accounts.service(sequence.tenant)
        self.waiting.append(sequence)
        self.entered[sequence.order] = self.now

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        """One leaves from wherever it stands. Its tenant stays known: others of it still run."""
        if self.waiting:
            sequence = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            self.queue.take(sequence)

    @rule(count=st.integers(70, 80))
    def storm(self, count: int) -> None:
        """Many come and go at once."""
        for number in range(count):
            self.push("abcd"[number % 4], number % 2, resumed=False)
        for sequence in self.waiting[-count:]:
            self.queue.take(sequence)
        del self.waiting[-count:]

    @rule(tenant=st.sampled_from("abcd"), cost=st.floats(0.0, 100.0))
    def charge(self, tenant: str, cost: float) -> None:
        """A tenant is served."""
        for sequence in self.waiting:
            if self._name(sequence) == tenant:
                self.accounts.charge(sequence.tenant, cost)
                self.service[tenant] += cost
                return

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        """Time passes; who waited too long rises."""
        self.now += seconds
        self.queue.promote(self.now)
        for sequence in self.waiting:
            assert sequence.level == 10 or self.now - self.entered[sequence.order] < AGEING_S or self._risen(sequence)

    def _risen(self, sequence: SequenceState) -> bool:
        self.entered[sequence.order] = self.now
        return sequence.level > sequence.request.priority

    @invariant()
    def in_order(self) -> None:
        """The queue gives everybody, in the order of the model, and asking changes nothing."""
        expected = self._expected()
        for _ in range(2):
            given = [sequence.order for sequence in self.queue.in_order()]
            assert given == expected
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_tokens == sum(sequence.num_tokens for sequence in self.waiting)
        head = self.queue.head()
        assert (None if head is None else head.order) == (expected[0] if expected else None)

    def _expected(self) -> list[int]:
        def key(sequence: SequenceState) -> tuple[int, bool, float, int, int]:
            if sequence.charged:
                return (-sequence.level, False, 0.0, 0, sequence.order)
            service = self.accounts.service(sequence.tenant)
            return (-sequence.level, True, service, sequence.tenant, sequence.order)

        for sequence in self.waiting:
            assert self.accounts.service(sequence.tenant) >= self.service[self._name(sequence)] - 1e-9
        return [sequence.order for sequence in sorted(self.waiting, key=key)]


QueueMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestWaitingQueue = QueueMachine.TestCase
