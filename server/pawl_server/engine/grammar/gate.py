"""Requests that wait for their grammar: compiled beside the step loop, a bounded number of them kept.

Owns the waiting and the cache; the step loop is told when a request may go on and never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from pawl.errors import InvalidRequest
from pawl_server.engine.grammar.checker import GrammarChecker
from pawl_server.engine.grammar.compiler import GrammarCompiler
from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint, bad_constraint
from pawl_server.scheduler.sequence import Ended, EndReason, SequenceRequest
from pawl_server.scheduler.state import SequenceView

__all__ = ["GrammarGate", "Held", "Released"]

log = logging.getLogger(__name__)

Outcome = CompiledConstraint | InvalidRequest
_Key = tuple[str, str]


@dataclass(slots=True)
class Held:
    """A request whose grammar is being compiled.

    Attributes:
        since: when it came, by the loop's clock.
        aborted: samples that ended meanwhile, and why.
    """

    request: SequenceRequest
    constraint: Constraint
    since: float
    aborted: dict[Hashable, str] = field(default_factory=dict)

    @property
    def handles(self) -> tuple[Hashable, ...]:
        """Of its samples, those that ended included."""
        return self.request.handles

    def ended(self, handle: Hashable) -> Ended:
        """The end of a sample that was aborted before it could begin."""
        return Ended(
            handle=handle,
            request_id=self.request.request_id,
            reason=EndReason.ABORTED,
            detail=self.aborted.get(handle, ""),
            stop_token_id=-1,
            cached_prompt_tokens=0,
            output_tokens=len(self.request.resume_ids),
            prefill_s=0.0,
            decode_s=0.0,
            stalled_s=0.0,
            preemption_count=0,
        )

    def describe(self, now: float) -> SequenceView:
        """What an operator may see of it."""
        request, constraint = self.request, self.constraint
        text = f"grammar: its {constraint.kind} of {len(constraint.source)} characters is being compiled"
        return SequenceView(
            request_id=request.request_id,
            phase="waiting",
            prompt_tokens=len(request.prompt_ids),
            output_tokens=len(request.resume_ids),
            num_blocks=0,
            age_s=now - self.since,
            preemption_count=0,
            wait_reason=text,
            user=request.user,
            priority=request.priority,
            tenant=request.tenant,
            preemption_reason="",
            lost_tokens=0,
        )


@dataclass(frozen=True, slots=True)
class Released:
    """A request that waits no longer: it may go on, or here is why it cannot."""

    held: Held
    outcome: SequenceRequest | InvalidRequest


class GrammarGate:
    """Requests with a constraint on their way to the scheduler.

    Args:
        compiler: for the model's vocabulary.
        num_threads: grammars checked and compiled at once.
        max_kept: compiled grammars kept, the last used.
        timeout_s: longest time that one may take.
    """

    def __init__(self, compiler: GrammarCompiler, *, num_threads: int, max_kept: int, timeout_s: float) -> None:
        self._compiler = compiler
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pawl-grammar")
        self._checkers = [GrammarChecker(timeout_s) for _ in range(num_threads)]
        self._idle: asyncio.Queue[GrammarChecker] = asyncio.Queue()
        for checker in self._checkers:
            self._idle.put_nowait(checker)
        self._max_kept = max_kept
        self._kept: OrderedDict[_Key, CompiledConstraint] = OrderedDict()
        self._held: dict[_Key, list[Held]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(len(held.handles) - len(held.aborted) for held in self.held())

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Kind and text of the compiled grammars that are kept, the last used at the end."""
        return list(self._kept)

    def held(self) -> Iterator[Held]:
        """Those that wait."""
        for waiting in self._held.values():
            yield from waiting

    def hold(
        self, request: SequenceRequest, constraint: Constraint, now: float, released: Callable[[Released], None]
    ) -> SequenceRequest | None:
        """A request as the scheduler may have it at once; None while its grammar is being compiled.

        Args:
            request: not yet compiled.
            constraint: its constraint.
            now: seconds.
            released: called when it waits no longer.
        """
        key = (constraint.kind, constraint.source)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return _compiled(request, constraint, kept)
        waiting = self._held.setdefault(key, [])
        waiting.append(Held(request, constraint, now))
        if len(waiting) == 1:
            task = asyncio.create_task(self._serve(key, constraint, released), name=f"compile {constraint.kind}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return None

    def abort(self, handle: Hashable, reason: str) -> Ended | None:
        """End a sample that waits here; None if it does not."""
        for waiting in self._held.values():
            for held in waiting:
                if handle in held.handles and handle not in held.aborted:
                    held.aborted[handle] = reason
                    if len(held.aborted) == len(held.handles):
                        waiting.remove(held)
                    return held.ended(handle)
        return None

    async def close(self) -> None:
        """Stop. What a thread compiles is left to its end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for checker in self._checkers:
            await checker.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, key: _Key, constraint: Constraint, released: Callable[[Released], None]) -> None:
        outcome = await self._outcome(constraint)
        if isinstance(outcome, CompiledConstraint):
            self._kept[key] = outcome
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        for held in self._held.pop(key):
            if isinstance(outcome, CompiledConstraint):
                released(Released(held, _compiled(held.request, held.constraint, outcome)))
            else:
                released(Released(held, outcome))

    async def _outcome(self, constraint: Constraint) -> Outcome:
        try:
            checker = await self._idle.get()
            try:
                refused = await checker.check(constraint)
            finally:
                self._idle.put_nowait(checker)
            if refused is not None:
                return refused
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._compiler.compile, constraint)
        except InvalidRequest as error:
            return error
        except Exception as error:
            log.exception("a %s of %d characters could not be compiled", constraint.kind, len(constraint.source))
            return bad_constraint(constraint, f"it could not be compiled: {type(error).__name__}")


def _compiled(request: SequenceRequest, constraint: Constraint, kept: CompiledConstraint) -> SequenceRequest:
    return replace(request, constraint=CompiledConstraint(constraint, kept.prototype))
