"""Constraints in a whole engine over the fake worker: waiting, ending, failing alone, crashing steps."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from pawl.errors import InvalidRequest
from pawl_server.config import EngineSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.grammar.compiler import checkpoint_tokenizer
from pawl_server.engine.link.client import EngineLink, EngineStream
from pawl_server.engine.spec import EngineSpec
from pawl_server.internal.v1 import engine_pb2
from pawl_server.scheduler.journal import Submitted, read_events
from pawl_server.sim.replay import replay
from tests.fakes.engine_harness import Recorder, ended, open_stream, running_engine, submit_frame, until
from tests.fakes.engine_worker import STUMBLE, VOCAB_SIZE, fake_spec
from tests.fakes.masked_bench import decode

EOS_ID = 0


def _open(link: EngineLink, prompt: list[int], num_output: int = 20, **fields: object) -> tuple[EngineStream, Recorder]:
    """A stream under a constraint."""
    recorder = Recorder()
    submit = submit_frame(prompt, num_output)
    submit.eos_token_ids.append(EOS_ID)
    submit.MergeFrom(engine_pb2.Submit(**fields))  # type: ignore[arg-type]
    return link.open(submit, recorder), recorder


def _text(recorder: Recorder) -> str:
    return decode([token_id for token_id in recorder.token_ids if token_id != EOS_ID])


class Gate:
    """A vocabulary that is not there before it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self) -> LLTokenizer:
        assert self.opened.wait(30)
        return checkpoint_tokenizer("demo", "", VOCAB_SIZE, [EOS_ID])


async def test_a_request_waits_for_its_grammar_and_says_so() -> None:
    gate = Gate()
    async with running_engine(open_tokenizer=gate) as running, running.link() as link:
        _, first = _open(link, [8, 9], regex="[ab]{3}")
        _, second = _open(link, [8, 9, 10], regex="[ab]{3}")
        loop = running.engine.loop
        await until(lambda: len(loop.describe()) == 2)
        assert [view.wait_reason for view in loop.describe()] == [
            "grammar: its regex of 7 characters is being compiled"
        ] * 2
        assert {view.phase for view in loop.describe()} == {"waiting"}
        await until(lambda: "pawl_requests_waiting{" in loop.meter.exposition().decode())
        await until(lambda: _waiting(running.engine) == 2.0)
        _, other = open_stream(link, [5, 6], 4)  # nobody else waits for it
        assert (await ended(other)).reason == engine_pb2.END_REASON_MAX_TOKENS
        gate.opened.set()
        for recorder in (first, second):
            assert (await ended(recorder)).reason == engine_pb2.END_REASON_EOS
            assert re.fullmatch("[ab]{3}", _text(recorder))
        await until(lambda: _waiting(running.engine) == 0.0)
        await running.until_empty()


def _waiting(engine: Engine) -> float:
    lines = engine.loop.meter.exposition().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("pawl_requests_waiting{") and 'reason="grammar"' in line)
    return float(line.rpartition(" ")[2])


async def test_an_abort_ends_a_request_that_waits_for_its_grammar() -> None:
    gate = Gate()
    async with running_engine(open_tokenizer=gate) as running, running.link() as link:
        stream, aborted = _open(link, [8, 9], regex="[ab]{3}")
        _, kept = _open(link, [8, 9], regex="[ab]{3}")
        await until(lambda: len(running.engine.loop.describe()) == 2)
        stream.abort(engine_pb2.ABORT_REASON_CANCELLED)
        assert (await ended(aborted)).reason == engine_pb2.END_REASON_ABORTED
        assert len(running.engine.loop.describe()) == 1
        gate.opened.set()
        assert (await ended(kept)).reason == engine_pb2.END_REASON_EOS
        await running.until_empty()


async def test_what_can_never_run_is_refused_before_its_grammar_is_looked_at() -> None:
    async with running_engine(open_tokenizer=Gate()) as running, running.link() as link:
        _, recorder = _open(link, list(range(1, 513)), regex="a(")
        end = await ended(recorder)
        assert (end.reason, end.error.reason) == (engine_pb2.END_REASON_REFUSED, "NEVER_FITS")
        assert running.engine.loop.describe() == []


async def test_a_model_without_a_vocabulary_refuses_constraints_alone() -> None:
    def none() -> LLTokenizer:
        raise InvalidRequest("no constraint can be kept with this model: no tokenizer.json", reason="NO_TOKENIZER")

    async with running_engine(open_tokenizer=none) as running, running.link() as link:
        _, recorder = _open(link, [8, 9], choices=engine_pb2.Choices(values=["a"]))
        end = await ended(recorder)
        assert (end.reason, end.error.reason) == (engine_pb2.END_REASON_REFUSED, "NO_TOKENIZER")
        assert end.error.code == "invalid_request"
        _, other = open_stream(link, [5, 6], 4)
        assert (await ended(other)).reason == engine_pb2.END_REASON_MAX_TOKENS


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_matcher_that_cannot_go_on_fails_its_sequence_alone(depth: int) -> None:
    """Resumed with what its grammar does not allow: as when two engines do not agree on it."""
    async with running_engine(_spec(depth)) as running, running.link() as link:
        _, bad = _open(link, [8, 9], regex="[ab]{3}", resume_ids=[400, 401])
        _, good = _open(link, [8, 9], regex="[ab]{3}")
        end = await ended(bad)
        assert end.reason == engine_pb2.END_REASON_FAILED
        assert (end.error.code, end.error.reason) == ("invalid_request", "CONSTRAINT_FAILED")
        assert end.error.field == "sampling.regex"
        assert "cannot go on" in end.error.message
        assert (await ended(good)).reason == engine_pb2.END_REASON_EOS
        await running.until_empty()


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_step_that_crashes_leaves_the_masks_as_they_were(depth: int) -> None:
    """The steps behind it wait for masks that will never be built; all is replayed, and the output is the same."""
    async with running_engine(_spec(depth)) as running, running.link() as link:
        _, undisturbed = _open(link, [8, 9], 40, regex="[ab]{30}")
        await ended(undisturbed)
        _, recorder = _open(link, [8, 9], 40, regex="[ab]{30}")
        await asyncio.wait_for(recorder.first_token.wait(), 20)
        _, stumbling = open_stream(link, [STUMBLE, 4], 4)
        assert (await ended(stumbling)).reason == engine_pb2.END_REASON_MAX_TOKENS
        assert (await ended(recorder)).reason == engine_pb2.END_REASON_EOS
        assert recorder.token_ids == undisturbed.token_ids
        assert len(running.worker.reset_epochs) >= 2
        await running.until_empty()


async def test_the_end_comes_where_nothing_else_can_and_not_before_the_least() -> None:
    async with running_engine() as running, running.link() as link:
        for seed in range(6):
            _, few = _open(link, [8, 9, seed], regex="(ab)*", min_output_tokens=12)
            _, all_of_it = _open(link, [8, 9, seed], regex="abc", min_output_tokens=12)
            if (await ended(few)).reason == engine_pb2.END_REASON_EOS:
                assert len(few.token_ids) > 12
            assert re.fullmatch("(ab)*a?", _text(few))
            assert (await ended(all_of_it)).reason == engine_pb2.END_REASON_EOS
            assert _text(all_of_it) == "abc"


@pytest.mark.parametrize("depth", [1, 2])
async def test_each_sample_of_a_request_has_a_matcher_of_its_own(depth: int) -> None:
    """And the first is what a request for one sample gives."""
    async with running_engine(_spec(depth)) as running, running.link() as link:
        _, single = _open(link, [8, 9, 10, 11, 12], regex="[ab]{2,9}c")
        await ended(single)
        samples = [Recorder() for _ in range(4)]
        submit = submit_frame([8, 9, 10, 11, 12], 20, sample_handles=range(1, 4))
        submit.eos_token_ids.append(EOS_ID)
        submit.regex = "[ab]{2,9}c"
        link.open_samples(submit, samples)
        for recorder in samples:
            assert (await ended(recorder)).reason == engine_pb2.END_REASON_EOS
            assert re.fullmatch("[ab]{2,9}c", _text(recorder))
        assert samples[0].token_ids == single.token_ids
        assert len({_text(recorder) for recorder in samples}) > 1
        await running.until_empty()


@pytest.mark.parametrize("depth", [1, 2])
async def test_what_was_decided_of_samples_with_a_grammar_is_decided_again(tmp_path: Path, depth: int) -> None:
    """The journal of an engine with constrained and free groups and single requests, to the byte."""
    spec = _with(fake_spec().engine, pipeline_depth=depth, journal=str(tmp_path / "journal"))
    async with running_engine(spec) as running, running.link() as link:
        recorders = []
        for number, regex in enumerate(["[ab]{2,9}c", "", "[ab]{3}", ""]):
            samples = [Recorder() for _ in range(4)]
            submit = submit_frame([8, 9, 10, 11, number], 12, sample_handles=range(10 * number + 1, 10 * number + 4))
            submit.handle = 10 * number
            submit.eos_token_ids.append(EOS_ID)
            if regex:
                submit.regex = regex
            link.open_samples(submit, samples)
            recorders += samples
        _, single = _open(link, [8, 9, 10], regex="[ab]{5}")
        for recorder in (*recorders, single):
            await ended(recorder)
        await running.until_empty()
        decisions = running.engine.loop.state.decisions.records()
    data = (tmp_path / "journal.0").read_bytes()
    replayed = replay(data)
    assert (replayed.again, replayed.decisions) == (data, decisions)
    submitted = [event for event in read_events(data) if isinstance(event, Submitted)]
    assert sorted((event.num_siblings, event.constrained) for event in submitted) == [
        (0, True), (3, False), (3, False), (3, True), (3, True),
    ]  # fmt: skip


async def test_a_bad_grammar_refuses_all_samples_and_one_may_leave_before() -> None:
    gate = Gate()
    async with running_engine(open_tokenizer=gate) as running, running.link() as link:
        for regex, wanted in (("[ab]{3}", engine_pb2.END_REASON_EOS), ("(?=a)", engine_pb2.END_REASON_REFUSED)):
            samples = [Recorder() for _ in range(3)]
            submit = submit_frame([8, 9], 20, sample_handles=range(1, 3))
            submit.eos_token_ids.append(EOS_ID)
            submit.regex = regex
            link.open_samples(submit, samples)
            if wanted == engine_pb2.END_REASON_EOS:
                await until(lambda: _waiting(running.engine) == 3.0)
            gate.opened.set()
            assert {(await ended(recorder)).reason for recorder in samples} == {wanted}
        await running.until_empty()


async def test_compiled_grammars_are_kept_and_no_more_than_told() -> None:
    spec = fake_spec()
    spec = _with(spec.engine, max_grammars=2)
    compiled: list[int] = []

    def counted() -> LLTokenizer:
        compiled.append(1)
        return checkpoint_tokenizer("demo", "", VOCAB_SIZE, [EOS_ID])

    async with running_engine(spec, open_tokenizer=counted) as running, running.link() as link:
        for regex in ("a", "b", "a", "c", "b"):
            _, recorder = _open(link, [8, 9], regex=regex)
            assert (await ended(recorder)).reason == engine_pb2.END_REASON_EOS
            assert _text(recorder) == regex
        assert running.engine.loop.grammars is not None
        assert running.engine.loop.grammars.gate.kept == [("regex", "c"), ("regex", "b")]
        assert len(compiled) == 1  # the vocabulary is read once


def _spec(depth: int) -> EngineSpec:
    return _with(fake_spec().engine, pipeline_depth=depth)


def _with(engine: EngineSettings, **changes: Any) -> EngineSpec:
    return fake_spec(engine=dataclasses.replace(engine, **changes))
