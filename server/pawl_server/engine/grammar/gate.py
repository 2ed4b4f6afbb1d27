"""Requests that wait for their grammar: compiled beside the step loop, some of them kept, in bounded memory.

Owns the waiting and the cache; the step loop is told when a request may go on and never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from pawl.errors import PawlError, ServerError
from pawl_server.engine.grammar.checker import CHECK_COMMAND, GrammarChecker
from pawl_server.engine.grammar.compiler import GrammarCompiler
from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint, bad_constraint
from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SequenceView

__all__ = ["GrammarGate", "Held", "Released"]

log = logging.getLogger(__name__)

Outcome = CompiledConstraint | PawlError
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
    outcome: SequenceRequest | PawlError


class GrammarGate:
    """Requests with a constraint on their way to the scheduler.

    Args:
        compiler: for the model's vocabulary.
        num_threads: grammars checked and compiled at once.
        max_kept: compiled grammars kept, the last used.
        max_kept_bytes: that these may take, and each that is used.
        timeout_s: longest time that one may take to be tried, and then to be compiled.
        check_command: the process that tries one.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        *,
        num_threads: int,
        max_kept: int,
        max_kept_bytes: int,
        timeout_s: float,
        check_command: Sequence[str] = CHECK_COMMAND,
    ) -> None:
        self._compiler = compiler
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pawl-grammar")
        self._checkers = [GrammarChecker(timeout_s, max_kept_bytes, check_command) for _ in range(num_threads)]
        self._idle: asyncio.Queue[GrammarChecker] = asyncio.Queue()
        for checker in self._checkers:
            self._idle.put_nowait(checker)
        self._timeout_s = timeout_s
        self._kept = _Kept(max_kept, max_kept_bytes)
        self._held: dict[_Key, list[Held]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(len(held.handles) - len(held.aborted) for held in self.held())

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Kind and text of the compiled grammars that are kept, the last used at the end."""
        return list(self._kept.entries)

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
        kept = self._kept.find(key)
        if kept is not None:
            return _compiled(request, constraint, kept)
        waiting = self._held.get(key)
        if waiting is None:  # one that all left is still being compiled
            waiting = self._held[key] = []
            task = asyncio.create_task(self._serve(key, constraint, released), name=f"compile {constraint.kind}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        waiting.append(Held(request, constraint, now))
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
        outcome = await self._outcome(key, constraint)
        for held in self._held.pop(key):
            if isinstance(outcome, CompiledConstraint):
                released(Released(held, _compiled(held.request, held.constraint, outcome)))
            else:
                released(Released(held, outcome))

    async def _outcome(self, key: _Key, constraint: Constraint) -> Outcome:
        try:
            checker = await self._idle.get()
            loop = asyncio.get_running_loop()
            try:
                num_bytes = await checker.check(constraint)
                await loop.run_in_executor(self._pool, self._compiler.tokenizer)  # no constraint's time
            except BaseException:
                self._idle.put_nowait(checker)
                raise
            compiling = loop.run_in_executor(self._pool, self._compiler.compile, constraint)
            compiling.add_done_callback(partial(self._let_next, checker))
            async with asyncio.timeout(self._timeout_s):
                compiled = await asyncio.shield(compiling)
        except PawlError as error:
            return error
        except TimeoutError:
            what = f"not compiled after {self._timeout_s:g} s (server setting engine.grammar_timeout_s): simplify it"
            return bad_constraint(constraint, what, "CONSTRAINT_TOO_COMPLEX")
        except Exception as error:
            log.exception("a %s of %d characters could not be compiled", constraint.kind, len(constraint.source))
            return ServerError(
                f"{constraint.kind}: it could not be compiled ({type(error).__name__}); the engine's log has the cause",
                reason="GRAMMAR_FAILED",
            )
        self._kept.put(key, compiled, num_bytes)
        return compiled

    def _let_next(self, checker: GrammarChecker, compiling: asyncio.Future[CompiledConstraint]) -> None:
        """A thread is free again, which a compilation that was given up keeps until its end: the next may begin."""
        if not compiling.cancelled():
            compiling.exception()  # of one that was given up nobody asks for it
        self._idle.put_nowait(checker)


class _Kept:
    """Compiled grammars for the next request with the same one, the last used at the end.

    Args:
        most: how many.
        most_bytes: that they may take; none alone takes more.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._num_bytes = 0
        self.entries: OrderedDict[_Key, tuple[CompiledConstraint, int]] = OrderedDict()

    def find(self, key: _Key) -> CompiledConstraint | None:
        """The grammar, which counts as used now."""
        found = self.entries.get(key)
        if found is None:
            return None
        self.entries.move_to_end(key)
        return found[0]

    def put(self, key: _Key, compiled: CompiledConstraint, num_bytes: int) -> None:
        """Keep one that is not kept, and no longer those that were used least lately, as far as they are too much."""
        self.entries[key] = compiled, num_bytes
        self._num_bytes += num_bytes
        while self.entries and (len(self.entries) > self._most or self._num_bytes > self._most_bytes):
            _, (_, freed) = self.entries.popitem(last=False)
            self._num_bytes -= freed


def _compiled(request: SequenceRequest, constraint: Constraint, kept: CompiledConstraint) -> SequenceRequest:
    return replace(request, constraint=CompiledConstraint(constraint, kept.prototype))
