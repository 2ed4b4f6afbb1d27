"""Everything that can happen on links at once, at random: every stream ends exactly once, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc
import msgspec
import pytest

from pawl_server.engine.link.auth import token_metadata
from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.link.protocol import PROTOCOL_VERSION
from pawl_server.exposition import parse_exposition
from pawl_server.internal.v1 import engine_pb2, engine_pb2_grpc
from tests.fakes.engine_harness import (
    DEADLINE_S,
    Recorder,
    RunningEngine,
    expected_output,
    running_engine,
    sample_seed,
    submit_frame,
    until,
)
from tests.fakes.engine_worker import DELAYED_POISON, STUMBLE, VOCAB_SIZE, FakeFacts, fake_spec
from tests.fakes.masked_bench import decode

NUM_SEEDS = int(os.environ.get("PAWL_NUM_STORMS", "2"))
NUM_BLOCKS = 48
DONE, FAILED, ABORTED = engine_pb2.END_REASON_MAX_TOKENS, engine_pb2.END_REASON_FAILED, engine_pb2.END_REASON_ABORTED
EOS, REFUSED, EOS_ID = engine_pb2.END_REASON_EOS, engine_pb2.END_REASON_REFUSED, 0
BAD = "a("
REGEXES = ["[ab]{3}", "(the )*x", "[a-f]{1,9}", BAD]


@dataclass(slots=True)
class Asked:
    """A sequence and what was heard of it."""

    prompt: Sequence[int]
    num_output: int
    seed: int
    recorder: Recorder
    num_resumed: int = 0
    regex: str = ""
    aborted: bool = False

    def check(self, *, lost: bool) -> None:
        """One end, and the tokens that it has alone; all of them, unless somebody ended it before."""
        told = self.recorder
        assert len(told.ends) + len(told.lost) == 1, (told.ends, told.lost)
        assert not told.defects
        if self.regex:
            self._check_constrained(lost=lost)
            return
        whole = expected_output(self.prompt, self.num_output, seed=self.seed)[self.num_resumed :]
        assert told.token_ids == whole[: len(told.token_ids)]
        assert told.indices == list(range(self.num_resumed, self.num_resumed + len(told.token_ids)))
        if told.lost:
            assert lost
        elif told.end.reason == FAILED:
            assert self.prompt[0] in {DELAYED_POISON, STUMBLE}  # who stumbles alone after a crash is taken for guilty
        elif told.end.reason == ABORTED:
            assert self.aborted
        else:
            assert told.end.reason == DONE
            assert told.token_ids == whole

    def _check_constrained(self, *, lost: bool) -> None:
        told = self.recorder
        assert told.indices == list(range(len(told.token_ids)))
        if told.lost:
            assert lost
        elif told.end.reason == EOS:
            assert told.token_ids[-1] == EOS_ID
            assert re.fullmatch(self.regex, decode(told.token_ids[:-1]))
        elif told.end.reason == REFUSED:
            assert self.regex == BAD
        else:
            assert told.end.reason == DONE or (self.aborted and told.end.reason == ABORTED)


@dataclass(slots=True)
class Storm:
    """Requests of several front ends, drawn as they go."""

    running: RunningEngine
    dice: random.Random
    asked: list[tuple[Asked, bool]] = field(default_factory=list)  # and whether its link was left early
    seeds: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def open(self, link: EngineLink) -> list[Asked]:
        """A request of one or several samples, now and then one that crashes its step."""
        dice, seed = self.dice, next(self.seeds) % 256
        prompt = [7] * dice.choice([0, 0, 12]) + [dice.randrange(900) for _ in range(dice.randrange(1, 40))]
        num_output = dice.randrange(1, 24)
        kind = dice.random()
        if kind < 0.03:
            prompt[0] = STUMBLE
        elif kind < 0.04:
            prompt = [DELAYED_POISON, dice.randrange(4, 8), 1]
        num_samples = dice.choice([1, 1, 1, 2, 4])
        num_resumed = dice.randrange(num_output) if num_samples == 1 and dice.random() < 0.2 else 0
        resume = expected_output(prompt, num_output, seed=seed)[:num_resumed]
        submit = submit_frame(prompt, num_output, resume=resume, seed=seed)
        submit.sample_seeds.extend(sample_seed(seed, place) for place in range(1, num_samples))
        regex = dice.choice(REGEXES) if not resume and prompt[0] < 900 and dice.random() < 0.2 else ""
        if regex:
            submit.regex = regex
            submit.eos_token_ids.append(EOS_ID)
        recorders = [Recorder() for _ in range(num_samples)]
        streams = link.open_samples(submit, recorders)
        asked = [
            Asked(prompt, num_output, sample_seed(seed, place) if place else seed, recorder, num_resumed, regex)
            for place, recorder in enumerate(recorders)
        ]
        ended = dice.random()
        if ended < 0.1:
            link.abort_samples([one.handle for one in streams], engine_pb2.ABORT_REASON_CANCELLED)
            for one in asked:
                one.aborted = True
        elif ended < 0.3:
            asked[-1].aborted = True
            streams[-1].abort(engine_pb2.ABORT_REASON_CANCELLED)
        return asked

    async def front_end(self, *, leaves: bool) -> None:
        """Opens requests over a while, and ends some in the middle; leaves before they are done, or waits."""
        asked: list[Asked] = []
        async with self.running.link(heartbeat_timeout_s=60.0) as link:
            for _ in range(self.dice.randrange(5, 25)):
                asked += self.open(link)
                for _ in range(self.dice.choice([0, 0, 1, 5])):
                    await asyncio.sleep(0)
            if not leaves:
                async with asyncio.timeout(DEADLINE_S):
                    for one in asked:
                        await one.recorder.done.wait()
                assert link.num_streams == 0
        self.asked += [(one, leaves) for one in asked]

    async def slow_reader(self) -> None:
        """Reads a frame now and then, behind a small window, and is gone in the middle of it."""
        small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12)]
        async with grpc.aio.insecure_channel(self.running.address, options=small_window) as channel:
            call = engine_pb2_grpc.EngineServiceStub(channel).Connect(metadata=token_metadata("secret"))
            hello = engine_pb2.Hello(protocol_version=PROTOCOL_VERSION, frontend_id="slow")
            await call.write(engine_pb2.ConnectRequest(hello=hello))
            num_open = self.dice.randrange(1, 7)
            for handle in range(1, 1 + num_open):
                submit = submit_frame([handle, 8], 300, seed=handle)
                submit.handle = handle
                await call.write(engine_pb2.ConnectRequest(submit=submit))
            heard: dict[int, int] = {}
            num_frames = self.dice.randrange(1, 30)
            while num_frames and num_open:
                num_frames -= 1
                frame = await call.read()
                assert isinstance(frame, engine_pb2.ConnectResponse)
                num_open -= frame.HasField("end")
                for handle, index in zip(frame.tokens.handles, frame.tokens.indices, strict=True):
                    assert index == heard.get(handle, 0)
                    heard[handle] = index + 1
                for _ in range(self.dice.randrange(8)):
                    await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call.code()


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
async def test_every_stream_ends_once_and_nothing_stays_behind(seed: int) -> None:
    dice = random.Random(seed)
    spec = fake_spec(num_blocks=NUM_BLOCKS, heartbeat_timeout_s=60.0)
    engine = replace(spec.engine, pipeline_depth=dice.choice([1, 2, 3]))
    spec = msgspec.structs.replace(spec, engine=engine)
    async with running_engine(spec, FakeFacts(num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE)) as running:
        storm = Storm(running, dice)
        parts = [storm.front_end(leaves=dice.random() < 0.4) for _ in range(dice.randrange(2, 6))]
        parts += [storm.slow_reader() for _ in range(dice.randrange(0, 3))]
        async with asyncio.timeout(3 * DEADLINE_S):
            await asyncio.gather(*parts)
        for one, left in storm.asked:
            one.check(lost=left)
        loop = running.engine.loop
        await until(lambda: not loop.describe())
        await running.until_empty()
        counts = loop.state.counts()
        assert counts.free_blocks + counts.cached_blocks == NUM_BLOCKS
        assert not loop.state.live

        def gauges() -> list[float]:
            totals = parse_exposition(loop.meter.exposition().decode())
            return [totals[name] for name in ("pawl_requests_running", "pawl_requests_waiting")]

        await until(lambda: gauges() == [0, 0])
