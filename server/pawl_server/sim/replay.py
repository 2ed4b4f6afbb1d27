"""A journal of a served scheduler, played to a new one: the production planner and committer decide all of it again.

Token ids are not in a journal. They are made so that blocks are equal where the journal says that they are, and that a
sequence stops where it did.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler import journal
from pawl_server.scheduler.budget import StepBudget, StepLoad
from pawl_server.scheduler.committer import commit, launch, void
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, SequenceState, Sibling
from pawl_server.scheduler.slots import IntArray, SlotTable
from pawl_server.scheduler.speculation import Proposals
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import PromptLogprobs, RowFailure, SamplingSpec, StepResult, TokenLogprobs

__all__ = ["ReplayError", "Replayed", "replay"]

_STOP = 1
_FIRST_NAMED = 2  # tokens of blocks that are numbered in the journal
_FIRST_UNNAMED = 1 << 26  # tokens of blocks that are not, one for each sequence


class ReplayError(ValueError):
    """The scheduler decided otherwise than the journal says, or the journal is none."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A journal that was replayed: what it holds, the same made again, and the latest decisions."""

    num_events: int
    num_steps: int
    num_sequences: int
    again: bytes
    decisions: list[bytes]


class _Recorded:
    """Drafts as many as the journal says, attempt by attempt: how many pay depends on tokens, which are not in it."""

    def __init__(self) -> None:
        self._attempts: deque[list[tuple[int, int]]] = deque()

    @property
    def num_looks(self) -> int:
        """As in the attempt that is the next."""
        return 1

    def expect(self, attempts: Sequence[list[tuple[int, int]]]) -> None:
        """The next step is planned in so many attempts, with (row, number) of the drafts of each."""
        self._attempts = deque(attempts)

    def propose(self, slots: SlotTable, rows: IntArray, load: StepLoad, most: int) -> Proposals:
        """As in the attempt that is the next; which tokens does not matter."""
        del slots, rows, load, most
        chosen = self._attempts.popleft() if self._attempts else []
        return Proposals({row: [_STOP] * number for row, number in chosen}, chosen)

    def launched(self, slots: SlotTable, proposals: Proposals) -> None:
        """Nothing is learnt."""

    def broke(self, sequence: SequenceState) -> None:
        """The journal knows of it."""

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Nothing is learnt."""


class _Player:
    """A scheduler to which events of a journal happen."""

    def __init__(self, began: journal.Began, names: dict[int, list[int]]) -> None:
        self.limits = began.limits
        self.state = SchedulerState(began.limits, CacheRoot("replayed", "", began.limits.block_size), epoch=began.epoch)
        self.state.journal = self.journal = journal.Journal(began.limits, began.target_gap_s, epoch=began.epoch)
        self.budget = StepBudget(began.target_gap_s) if began.target_gap_s > 0 else None
        self.num_steps = 0
        self.num_sequences = 0
        self._names = names
        self._recorded = _Recorded()
        if began.limits.max_drafts:
            self.state.speculation = self._recorded
        self._in_flight: deque[Plan] = deque()
        self._settled: Plan | None = None

    def play(self, event: journal.Event) -> None:
        """Let one event happen."""
        state = self.state
        match event:
            case journal.Submitted():
                self._submit(event)
            case journal.Aborted(now, sequence):
                if state.abort(sequence, "replayed", now) is None:
                    raise ReplayError(f"sequence {sequence} is aborted and does not live")
            case journal.Launched():
                self._launch(event)
            case journal.Settled():
                plan = self._in_flight.popleft()
                commit(state, plan, self._result(event, plan), event.now)
                self._settled = plan
            case journal.Measured(worker_s, elapsed_s):
                self._measure(worker_s, elapsed_s)
            case journal.Voided():
                void(state, self._in_flight.pop())
            case journal.Reset(now, epoch):
                state.reset_worker(epoch, now)
            case journal.Flushed():
                state.flush_prefix_cache()
            case journal.Named() | journal.Began():
                pass

    def _token(self, sequence: int, position: int) -> int:
        names, index = self._names.get(sequence, []), position // self.limits.block_size
        return _FIRST_NAMED + names[index] if index < len(names) else _FIRST_UNNAMED + sequence

    def _submit(self, event: journal.Submitted) -> None:
        first = self.num_sequences
        self.num_sequences += 1 + event.num_siblings
        tokens = [self._token(first, position) for position in range(event.num_prompt + event.num_resumed)]
        request = SequenceRequest(
            handle=first,
            request_id=str(first),
            prompt_ids=tokens[: event.num_prompt],
            resume_ids=tokens[event.num_prompt :],
            sampling=SamplingSpec(),
            max_output_tokens=event.max_output_tokens,
            min_output_tokens=event.min_output_tokens,
            cache_key=event.namespace.to_bytes(8, "little"),
            eos_token_ids=frozenset({_STOP}),
            prompt_logprobs=event.prompt_logprobs,
            prompt_logprobs_from=event.prompt_logprobs_from,
            bypass_prefix_cache=not event.caches,
            retain_prefix_s=event.retain_prefix_s,
            priority=event.priority,
            tenant=str(event.tenant),
            weight=event.weight,
            constraint=True if event.constrained else None,
            siblings=[Sibling(first + number, 0) for number in range(1, 1 + event.num_siblings)],
        )
        refusal = self.state.submit(request, event.now)
        if refusal is not None:
            raise ReplayError(f"sequence {first} is refused, which the journal says was taken: {refusal.message}")
        for number in range(first + 1, self.num_sequences):  # a block of prompt and output has the name of its sample
            own = self.state.live[number].tokens
            for position in range(event.num_prompt - event.num_prompt % self.limits.block_size, event.num_prompt):
                own[position] = self._token(number, position)

    def _launch(self, event: journal.Launched) -> None:
        self.num_steps += 1
        self._recorded.expect(event.drafts)
        plan = plan_step(self.state, event.limits or self.limits, event.now, self.budget)
        if plan is None:
            raise ReplayError(f"launch {self.num_steps}: nothing is planned")
        if journal.fingerprint(plan.wire()) != event.fingerprint:
            raise ReplayError(f"launch {self.num_steps} (step {plan.step}): the plan is another one")
        launch(self.state, plan)
        self._in_flight.append(plan)

    def _result(self, event: journal.Settled, plan: Plan) -> StepResult:
        entry, slots = self.state.ledger[0], self.state.slots
        alive = dict(zip(entry.rows.tolist(), entry.alive(slots).tolist(), strict=True))
        stops = dict(event.stopped)
        given: Counter[int] = Counter()
        token_ids = []
        for row in event.rows:
            sequence = slots.owner(row) if alive[row] else entry.stale.get(row)
            position = 0 if sequence is None else sequence.num_tokens + given[row]
            given[row] += 1
            if sequence is None:
                token_ids.append(_STOP)  # nobody gets it
            elif stops.get(sequence.order, 0) == position + 1 - sequence.num_prompt:
                token_ids.append(_STOP)
            else:
                token_ids.append(self._token(sequence.order, position))
        nothing = TokenLogprobs(0, 0.0, 1, [], [])
        scored = [PromptLogprobs(row, first, [nothing] * number) for row, first, number in event.scored]
        failures = [RowFailure(row, "replayed") for row in event.failed]
        return StepResult(plan.step, plan.epoch, event.rows, token_ids, [], scored, failures, 0.0, 0.0, 0.0)

    def _measure(self, worker_s: float, elapsed_s: float) -> None:
        self.journal.measured(worker_s, elapsed_s)
        plan = self._settled
        if plan is None:
            raise ReplayError("a step is measured and none was settled")
        if self.budget is not None:
            self.budget.observe(plan.load, worker_s)


def replay(data: bytes) -> Replayed:
    """Let everything in a journal happen again.

    Raises:
        ReplayError: a decision was another one.
        ValueError: the bytes are no journal.
    """
    events = journal.read_events(data)
    if not events or not isinstance(began := events[0], journal.Began):
        raise ReplayError("the journal does not begin with the beginning of a scheduler")
    if began.version != journal.VERSION:
        raise ReplayError(f"the journal has version {began.version}, and {journal.VERSION} can be replayed")
    names: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, journal.Named):
            known = names.setdefault(event.sequence, [])
            known[event.begin :] = event.names
    player = _Player(began, names)
    for event in events:
        player.play(event)
    again = player.journal.drain()
    return Replayed(len(events), player.num_steps, player.num_sequences, again, player.state.decisions.records())
