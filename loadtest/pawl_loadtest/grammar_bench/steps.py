"""What constraints cost a step: one engine on the embedded model, as many streams with as without, in turns."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pawl_server.config import EngineSettings, ModelSettings
from pawl_server.engine.engine import Engine
from pawl_server.engine.link.client import EngineLink
from pawl_server.engine.spec import EngineSpec
from pawl_server.frontend.tokens import TextTokenizer
from pawl_server.internal.v1 import engine_pb2
from pawl_workers.model.source import resolve_checkpoint

__all__ = ["KINDS", "StepCost", "lines", "measure_steps"]

KINDS: Mapping[str, Mapping[str, str]] = {
    "free": {},
    "regex": {"regex": "[a-z ]{1000,}"},
    "schema": {"json_schema": '{"type":"array","items":{"type":"string","maxLength":20},"minItems":400}'},
}
"""None of them ends by itself within the tokens asked for."""

_ALLOWED = {"free": None, "regex": set("abcdefghijklmnopqrstuvwxyz "), "schema": None}
_PROMPTS = ("Once upon a time", "The fox", "A list of things:", "Tell me")
_TOKEN = "bench"  # noqa: S105 (of an engine that listens on loopback while it is measured)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of one kind: milliseconds of a step in each round."""

    kind: str
    step_ms: Sequence[float]


@dataclass(slots=True)
class _Stream:
    """Counts what one stream gives."""

    token_ids: list[int] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""

    def on_tokens(self, indices: Sequence[int], token_ids: Sequence[int], _: object) -> None:
        self.token_ids += token_ids

    def on_prompt_logprobs(self, frame: object) -> None:
        """None are asked for."""

    def on_end(self, end: engine_pb2.End) -> None:
        if end.reason != engine_pb2.END_REASON_MAX_TOKENS:
            self.failure = f"ended with {engine_pb2.EndReason.Name(end.reason)} {end.error.message}"
        self.done.set()

    def on_lost(self, detail: str) -> None:
        self.failure = detail
        self.done.set()

    def on_defect(self, error: Exception) -> None:
        self.failure = repr(error)
        self.done.set()


async def measure_steps(num_streams: int, num_tokens: int, rounds: int, depth: int, num_threads: int) -> list[StepCost]:
    """Decode `num_streams` streams of `num_tokens` tokens of each kind, in turns.

    Raises:
        RuntimeError: a stream ended otherwise than by its number of tokens, or left its constraint.
    """
    settings = EngineSettings(max_running=num_streams, pipeline_depth=depth, prefix_cache=False)
    spec = EngineSpec(model=ModelSettings(), engine=settings, internal_token=_TOKEN, num_threads=num_threads)
    engine = Engine(spec, lambda _: None)
    addresses = await engine.start()
    running = asyncio.create_task(engine.run())
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    try:
        async with EngineLink(addresses.address, _TOKEN, "bench") as link:
            for _ in range(rounds + 1):  # the first one warms up
                for kind in KINDS:
                    found[kind].append(await _round(engine, link, kind, num_streams, num_tokens))
    finally:
        await engine.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return [StepCost(kind, times[1:]) for kind, times in found.items()]


async def _round(engine: Engine, link: EngineLink, kind: str, num_streams: int, num_tokens: int) -> float:
    tokenizer = TextTokenizer.load(resolve_checkpoint(None))
    streams = [_Stream() for _ in range(num_streams)]
    loop, before = asyncio.get_running_loop(), engine.loop.num_steps
    started = loop.time()
    for number, stream in enumerate(streams):
        prompt = tokenizer.encode(_PROMPTS[number % len(_PROMPTS)], add_special_tokens=True)
        sampling = engine_pb2.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=number)
        submit = engine_pb2.Submit(
            request_id=f"{kind}-{number}", prompt_ids=prompt, sampling=sampling, max_output_tokens=num_tokens,
            **KINDS[kind],  # type: ignore[arg-type]
        )  # fmt: skip
        link.open(submit, stream)
    for stream in streams:
        await stream.done.wait()
    elapsed = loop.time() - started
    for stream in streams:
        text, allowed = tokenizer.decode(stream.token_ids, skip_special_tokens=True), _ALLOWED[kind]
        if stream.failure or (allowed is not None and not set(text) <= allowed):
            raise RuntimeError(f"{kind}: {stream.failure or text}")
    return elapsed / (engine.loop.num_steps - before) * 1e3


def lines(costs: Sequence[StepCost]) -> Iterator[str]:
    """Medians, the spread of the rounds, and the ratio to free output round by round."""
    free = costs[0].step_ms
    for cost in costs:
        ratios = [ms / base for ms, base in zip(cost.step_ms, free, strict=True)]
        low, high = min(ratios), max(ratios)
        line = f"{cost.kind:8} {statistics.median(cost.step_ms):7.3f} ms a step"
        yield f"{line}, {statistics.median(ratios):.3f} of free output ({low:.3f} to {high:.3f})"
