"""The gate before the scheduler: what it keeps, for how long anybody waits in it, and what a stuck compiler costs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from llguidance import LLTokenizer

from pawl.errors import InvalidRequest, PawlError, ServerError, Unavailable
from pawl_server.engine.grammar.compiler import GrammarCompiler
from pawl_server.engine.grammar.constraint import CompiledConstraint, Constraint
from pawl_server.engine.grammar.gate import GrammarGate, Released
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_workers.plan import SamplingSpec

STUCK = "[st]{3}"


class StuckCompiler(GrammarCompiler):
    """Does not come back from one of its grammars before it is let go."""

    def __init__(self) -> None:
        super().__init__(lambda: LLTokenizer("byte"))
        self.let_go = threading.Event()
        self.sources: list[str] = []

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        self.sources.append(constraint.source)
        if constraint.source == STUCK:
            assert self.let_go.wait(60)
        return super().compile(constraint)


@asynccontextmanager
async def open_gate(compiler: GrammarCompiler, **changes: object) -> AsyncIterator[GrammarGate]:
    """A gate with two threads that waits three seconds and keeps much, but for what is said."""
    settings: dict[str, object] = {
        "num_threads": 2,
        "max_kept": 10,
        "max_kept_bytes": 1 << 26,
        "timeout_s": 3.0,
    } | changes
    gate = GrammarGate(compiler, **settings)  # type: ignore[arg-type]
    try:
        yield gate
    finally:
        await gate.close()


class Passing:
    """Requests that pass a gate."""

    def __init__(self, gate: GrammarGate) -> None:
        self._gate = gate
        self._waiting: dict[Hashable, asyncio.Future[SequenceRequest | PawlError]] = {}

    def begin(
        self, constraint: Constraint, handle: Hashable | None = None
    ) -> asyncio.Future[SequenceRequest | PawlError]:
        """What will become of a request with this constraint."""
        handle = object() if handle is None else handle
        request = SequenceRequest(
            handle=handle, request_id="r", prompt_ids=[1], sampling=SamplingSpec(), max_output_tokens=1, cache_key=b"",
            constraint=constraint,
        )  # fmt: skip
        future = self._waiting[handle] = asyncio.get_running_loop().create_future()
        at_once = self._gate.hold(request, constraint, 0.0, self._released)
        if at_once is not None:
            future.set_result(at_once)
        return future

    async def through(self, constraint: Constraint) -> bool:
        """Whether a request with this constraint goes on to the scheduler."""
        return isinstance(await asyncio.wait_for(self.begin(constraint), 20), SequenceRequest)

    def _released(self, released: Released) -> None:
        self._waiting[released.held.request.handle].set_result(released.outcome)


async def test_a_grammar_that_the_engine_does_not_compile_in_time_is_refused_alone() -> None:
    """Its thread is busy until it is done; the other one serves the rest, and afterwards both do."""
    compiler = StuckCompiler()
    async with open_gate(compiler) as gate:
        passing = Passing(gate)
        stuck = passing.begin(Constraint("regex", STUCK))
        for number in range(1, 5):
            assert await passing.through(Constraint("regex", f"a{{{number}}}b"))
        refused = await asyncio.wait_for(stuck, 60)
        assert isinstance(refused, InvalidRequest)
        assert refused.reason == "CONSTRAINT_TOO_COMPLEX"
        assert "grammar_timeout_s" in refused.message
        assert len(gate) == 0
        again = [passing.begin(Constraint("regex", STUCK)) for _ in range(3)]
        compiler.let_go.set()
        for future in again:
            assert isinstance(await asyncio.wait_for(future, 60), SequenceRequest)
        assert compiler.sources.count(STUCK) == 2, "one compilation for all who wait"


async def test_a_grammar_that_all_who_wait_give_up_is_compiled_once_for_who_comes_next() -> None:
    compiler = StuckCompiler()
    async with open_gate(compiler, timeout_s=60.0) as gate:
        passing = Passing(gate)
        given_up = passing.begin(Constraint("regex", STUCK), "given up")
        assert gate.abort("given up", "cancelled") is not None
        again = [passing.begin(Constraint("regex", STUCK)) for _ in range(2)]
        assert await passing.through(Constraint("regex", "a")), "the other thread is free"
        compiler.let_go.set()
        for future in again:
            assert isinstance(await asyncio.wait_for(future, 60), SequenceRequest)
        assert not given_up.done()
        assert sorted(compiler.sources) == sorted([STUCK, "a"])
        assert len(gate) == 0


async def test_grammars_are_kept_as_far_as_memory_goes() -> None:
    """Two of nearly 2 MB do not stay beside each other in 3 MB; small ones do."""
    large = [Constraint("choices", json.dumps([f"{name} {i} of 1,500" for i in range(1500)])) for name in "ab"]
    small = [Constraint("regex", f"a{{{number}}}") for number in range(1, 4)]
    compiler = StuckCompiler()
    async with open_gate(compiler, max_kept_bytes=3_000_000) as gate:
        passing = Passing(gate)
        for constraint in (large[0], *small, large[1]):
            assert await passing.through(constraint)
        kept = [source for _, source in gate.kept]
        assert kept == [*(one.source for one in small), large[1].source]
        assert await passing.through(small[0])
        assert compiler.sources.count(small[0].source) == 1
        assert [source for _, source in gate.kept][-1] == small[0].source


async def test_what_is_not_the_grammars_fault_is_not_put_on_the_caller() -> None:
    async with open_gate(StuckCompiler(), check_command=["/nowhere/python"]) as gate:
        refused = await asyncio.wait_for(Passing(gate).begin(Constraint("regex", "a")), 20)
        assert isinstance(refused, Unavailable)
        assert refused.reason == "GRAMMAR_CHECKER_FAILED"

    def no_vocabulary() -> LLTokenizer:
        raise OSError("planted")

    async with open_gate(GrammarCompiler(no_vocabulary)) as gate:
        refused = await asyncio.wait_for(Passing(gate).begin(Constraint("regex", "a")), 60)
        assert isinstance(refused, ServerError)
        assert "OSError" in refused.message
