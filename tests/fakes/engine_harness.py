"""A whole engine in this process over the fake worker, and the front end's end of its link."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from llguidance import LLTokenizer

from pawl_server.engine.engine import Engine
from pawl_server.engine.grammar.compiler import checkpoint_tokenizer
from pawl_server.engine.link.client import EngineLink, EngineStream
from pawl_server.engine.spec import EngineProgress, EngineSpec
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.engine_worker import VOCAB_SIZE, FakeEngineWorker, FakeFacts, fake_spec
from tests.fakes.shadow_worker import isolated_output

DEADLINE_S = 20.0


@dataclass(slots=True)
class Recorder:
    """What the events of one stream said."""

    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[engine_pb2.PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[engine_pb2.PromptLogprobs] = field(default_factory=list)
    ends: list[engine_pb2.End] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    defects: list[Exception] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    first_token: asyncio.Event = field(default_factory=asyncio.Event)

    def on_tokens(
        self,
        indices: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[engine_pb2.PositionLogprobs],
    ) -> None:
        """Note them."""
        self.indices += indices
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.first_token.set()

    def on_prompt_logprobs(self, frame: engine_pb2.PromptLogprobs) -> None:
        """Note it."""
        self.prompt_logprobs.append(frame)

    def on_end(self, end: engine_pb2.End) -> None:
        """Note it."""
        self.ends.append(end)
        self.done.set()

    def on_lost(self, detail: str) -> None:
        """Note it."""
        self.lost.append(detail)
        self.done.set()

    def on_defect(self, error: Exception) -> None:
        """Note it."""
        self.defects.append(error)
        self.done.set()

    @property
    def end(self) -> engine_pb2.End:
        """The one end."""
        (end,) = self.ends
        assert not self.lost
        return end


@dataclass(slots=True)
class RunningEngine:
    """An engine that serves."""

    engine: Engine
    worker: FakeEngineWorker
    address: str
    metrics_address: str
    progress: list[EngineProgress]
    running: asyncio.Task[None]

    def link(self, token: str = "secret", heartbeat_timeout_s: float = 5.0) -> EngineLink:
        """A link to it, not yet connected."""
        return EngineLink(self.address, token, "test", heartbeat_timeout_s)

    async def until_empty(self) -> None:
        """Wait until no sequence is left; then every block must be free or cached."""
        counts = self.engine.loop.state.counts
        await until(lambda: counts().running + counts().waiting == 0)
        assert counts().used_blocks == 0


@contextlib.asynccontextmanager
async def running_engine(
    spec: EngineSpec | None = None,
    facts: FakeFacts | None = None,
    open_tokenizer: Callable[[], LLTokenizer] | None = None,
) -> AsyncIterator[RunningEngine]:
    """Start an engine, run it, stop it. Its tokens are the embedded model's for constraints, unless told otherwise."""
    spec = spec or fake_spec()
    worker = FakeEngineWorker(facts or FakeFacts(num_blocks=spec.engine.num_blocks))
    progress: list[EngineProgress] = []
    opened = open_tokenizer or (lambda: checkpoint_tokenizer("demo", "", VOCAB_SIZE, worker.facts.eos_token_ids))
    engine = Engine(spec, progress.append, lambda _spec, _progress: worker, lambda _spec, _facts: opened())
    addresses = await engine.start()
    task = asyncio.create_task(engine.run())
    try:
        yield RunningEngine(engine, worker, addresses.address, addresses.metrics_address, progress, task)
    finally:
        if worker.gate is not None:
            worker.gate.set()
        await engine.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, at most DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def ended(recorder: Recorder) -> engine_pb2.End:
    """Wait for the end of a stream."""
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    return recorder.end


def submit_frame(
    prompt: Sequence[int],
    num_output: int = 8,
    *,
    resume: Sequence[int] = (),
    seed: int = 0,
    sample_handles: Sequence[int] = (),
) -> engine_pb2.Submit:
    """A Submit with defaults filled in, as a front end sends it; `sample_seed` says with which seeds."""
    return engine_pb2.Submit(
        request_id=f"request-{seed}",
        prompt_ids=prompt,
        resume_ids=resume,
        sampling=engine_pb2.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=seed),
        max_output_tokens=num_output,
        cache_key=seed.to_bytes(8, "little"),
        sample_handles=sample_handles,
        sample_seeds=[sample_seed(seed, place) for place in range(1, len(sample_handles) + 1)],
    )


def sample_seed(seed: int, index: int) -> int:
    """Seed of a sample, such that the fake worker knows all samples of a prompt for one namespace."""
    return seed + 256 * index


def open_stream(
    link: EngineLink, prompt: Sequence[int], num_output: int = 8, *, seed: int = 0
) -> tuple[EngineStream, Recorder]:
    """Open a stream and record it."""
    recorder = Recorder()
    return link.open(submit_frame(prompt, num_output, seed=seed), recorder), recorder


def expected_output(prompt: Sequence[int], num_output: int, *, seed: int = 0) -> list[int]:
    """What the fake worker gives for a prompt that nothing disturbs."""
    return isolated_output(prompt, seed, num_output, VOCAB_SIZE)
