"""Which tokens the constrained sequences of a step may choose: built on a thread while the step's forward pass runs.

A mask depends on every token before it. With two steps in flight those of the older one are not known when the newer
one is sent, so its masks are begun when the older one is committed; the worker waits for them before it chooses.
A row with drafts has a mask after each of them as well, as if they were output.
A matcher takes the tokens that the scheduler committed, whoever generated them: after a preemption, a reset of the
worker or on another engine (`resume_ids`) that is the same thing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint, bad_constraint
from pawl_server.engine.grammar.source import error_of
from pawl_server.scheduler.sequence import SequenceState, Status
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import RowFailure, StepResult
from pawl_workers.row_masks import MaskSource, RowMasks

__all__ = ["MaskBuilder", "MasksGivenUpError"]


class MasksGivenUpError(RuntimeError):
    """The step was voided before its masks could be built."""


@dataclass(slots=True)
class _Session:
    """One sequence's matcher. `error` is why it cannot go on; written before the masks of its step are there."""

    constraint: Constraint
    matcher: LLMatcher
    num_taken: int = 0  # tokens of output that were handed to the matcher
    error: str = ""


@dataclass(slots=True)
class _Step:
    """A launched step: who samples in it under a constraint, by row, and their drafts."""

    owners: list[tuple[int, SequenceState]]
    drafts: Mapping[int, list[int]]
    masks: Future[RowMasks] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Job:
    """The masks of a row: the session, tokens that its matcher has not taken, output tokens with these, and drafts."""

    row: int
    session: _Session
    token_ids: list[int]
    num_output: int
    drafts: list[int]


class MaskBuilder:
    """The matchers of one replica. All calls come from the step loop; nothing here blocks it.

    Args:
        vocab_size: ids that the model can choose.
        eos_token_ids: what ends a text.
        num_threads: masks built at once.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._not_eos = np.full(self._num_words, 0xFFFFFFFF, dtype=np.uint32)
        for token_id in eos_token_ids:
            self._not_eos[token_id // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id % 32)))
        self._num_threads = num_threads
        self._executor: LLExecutor | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pawl-masks")
        self._sessions: dict[Hashable, _Session] = {}
        self._steps: deque[_Step] = deque()  # in flight, oldest first
        self._begun: Future[RowMasks] | None = None  # the last masks that were begun: until then matchers are in use

    def launched(self, state: SchedulerState, drafts: Mapping[int, list[int]]) -> MaskSource | None:
        """The newest step was launched; gives what its worker asks for its masks, None if it needs none.

        Args:
            state: with it in its ledger.
            drafts: token ids by row.
        """
        entry, slots = state.ledger[-1], state.slots
        rows = entry.rows[(entry.num_samples > 0) & slots.constrained[entry.rows]]
        step = _Step([(row, slots.owner(row)) for row in rows.tolist()], drafts)
        self._steps.append(step)
        if len(self._steps) == 1:
            self._begin(step)
        return step.masks.result if step.owners else None

    def look_ahead(self, sequence: SequenceState) -> LLMatcher | None:
        """A matcher that has taken all tokens of a sequence of which no step is in flight; it is a copy.

        None when nothing can follow, and while masks are built, which may be those of a step that was given up.
        """
        if self._begun is not None and not self._begun.done():
            return None
        session = self._session(sequence)
        return session.matcher.deep_copy() if _advance(session, _new_tokens(session, sequence)) else None

    def explain(self, result: StepResult) -> StepResult:
        """The result of the oldest step, with the reason of rows that failed because of their grammar."""
        if not result.failures or not self._steps[0].owners:
            return result
        owners = dict(self._steps[0].owners)
        failures = [self._explained(failure, owners.get(failure.row)) for failure in result.failures]
        return msgspec.structs.replace(result, failures=failures)

    def committed(self, state: SchedulerState) -> None:
        """The oldest step was committed: the masks of the next one can be built."""
        self._steps.popleft()
        if self._steps:
            self._begin(self._steps[0])
        if self._sessions:
            for handle in [handle for handle in self._sessions if handle not in state.live]:
                del self._sessions[handle]

    def void(self) -> None:
        """All steps in flight are given up: no worker waits for their masks any longer."""
        for step in self._steps:
            if not step.masks.done() and step is not self._steps[0]:
                step.masks.set_exception(MasksGivenUpError("an older step failed"))
        self._steps.clear()

    def close(self) -> None:
        """Let the thread go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _explained(self, failure: RowFailure, sequence: SequenceState | None) -> RowFailure:
        session = None if sequence is None else self._sessions.get(sequence.request.handle)
        if session is None or not session.error:
            return failure
        return RowFailure(failure.row, session.error, session.constraint.field)

    def _begin(self, step: _Step) -> None:
        if not step.owners:
            return
        jobs = []
        for row, sequence in step.owners:
            if sequence.status is Status.ENDED:
                continue
            session = self._session(sequence)
            token_ids = _new_tokens(session, sequence)
            jobs.append(_Job(row, session, token_ids, session.num_taken, step.drafts.get(row, [])))
        self._begun = step.masks
        self._pool.submit(self._answer, step.masks, jobs)

    def _session(self, sequence: SequenceState) -> _Session:
        handle = sequence.request.handle
        session = self._sessions.get(handle)
        if session is None:
            compiled = sequence.request.constraint
            if not isinstance(compiled, CompiledConstraint):
                raise TypeError(f"{sequence.request.request_id} runs with a constraint that was not compiled")
            session = _Session(compiled.constraint, compiled.prototype.deep_copy())
            self._sessions[handle] = session
        return session

    def _answer(self, masks: Future[RowMasks], jobs: Sequence[_Job]) -> None:
        """On the thread: a failure of all of it crashes the step, as one of the worker would."""
        try:
            masks.set_result(self._build(jobs))
        except Exception as error:
            masks.set_exception(error)

    def _build(self, jobs: Sequence[_Job]) -> RowMasks:
        rows = [job.row for job in jobs for _ in range(1 + len(job.drafts))]
        words = np.zeros((len(rows), self._num_words), dtype=np.uint32)
        first, good = 0, list[tuple[int, _Job]]()
        for job in jobs:
            if _advance(job.session, job.token_ids):
                good.append((first, job))
            first += 1 + len(job.drafts)
        self._fill(words, good)
        for first, job in good:
            if job.session.matcher.is_error() or not words[first].any():
                words[first] = 0  # leaves no token to choose: the row fails alone
                job.session.error = _why(job.session)
                continue
            missing = job.session.constraint.min_output_tokens - job.num_output
            for place in range(first, first + min(missing, 1 + len(job.drafts))):
                longer = words[place] & self._not_eos
                if longer.any():
                    words[place] = longer
        return RowMasks(rows, words)

    def _fill(self, words: NDArray[np.uint32], jobs: Sequence[tuple[int, _Job]]) -> None:
        """Write the masks of each job from its place on; what follows a draft that does not fit stays zero."""
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        target = (words.ctypes.data, words.strides[0], len(words))
        plain = [(job.session.matcher, first) for first, job in jobs if not job.drafts]
        # A matcher for which a draft is too much is of no use any more, though its output may never come there.
        drafted = [(job.session.matcher.deep_copy(), first, job) for first, job in jobs if job.drafts]
        if drafted:
            tried = [(matcher, first, job.drafts) for matcher, first, job in drafted]
            self._executor.unsafe_compute_mask_ptr_with_draft_token(tried, *target)
        for matcher, first, job in drafted:
            if matcher.is_error():
                words[first : first + 1 + len(job.drafts)] = 0
                plain.append((job.session.matcher, first))
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *target)


def _new_tokens(session: _Session, sequence: SequenceState) -> list[int]:
    """Tokens of the sequence that the matcher was not given; it is given them now."""
    token_ids = sequence.tokens[sequence.num_prompt + session.num_taken :].tolist()
    session.num_taken += len(token_ids)
    return token_ids


def _advance(session: _Session, token_ids: list[int]) -> bool:
    """Let the matcher take tokens; False when it cannot, now or since earlier."""
    if not session.error and not session.matcher.consume_tokens(token_ids):
        session.error = _why(session)
    return not session.error


def _why(session: _Session) -> str:
    reason = error_of(session.matcher) if session.matcher.is_error() else "no token can follow"
    return str(bad_constraint(session.constraint, f"the output cannot go on: {reason}"))
