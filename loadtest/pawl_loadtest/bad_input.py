"""`python -m pawl_loadtest.bad_input`: how long a running server takes to refuse requests that are wrong.

Sends each malformed request many times and reports the median and the 99th percentile by kind, from the call to its
status. Fails when one is not refused as it should be, when the median of all is above the goal, or when the server
does not generate any more afterwards. Bytes go out as they are: the SDK would refuse some of these itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from pawl import AsyncClient, Model, PawlError
from pawl.v1 import inference_pb2, types_pb2
from pawl_loadtest.arguments import positive
from pawl_loadtest.measure import percentile

__all__ = ["Case", "Refusals", "cases", "main"]

_INVALID = (grpc.StatusCode.INVALID_ARGUMENT,)
_TOO_LARGE = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """One wrong request: its name, the method, the bytes of the message, and the statuses that are right."""

    name: str
    method: str
    body: bytes
    expected: tuple[grpc.StatusCode, ...] = _INVALID

    @property
    def path(self) -> str:
        """As gRPC calls it."""
        return f"/pawl.v1.InferenceService/{self.method}"


@dataclass(slots=True)
class Refusals:
    """What became of one case: seconds of each refusal, and what was answered instead of one."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    wrong: dict[str, int] = field(default_factory=dict)

    def add(self, seconds: float, status: grpc.StatusCode) -> None:
        """An answer came after this time."""
        if status in self.case.expected:
            self.seconds.append(seconds)
        else:
            self.wrong[status.name] = self.wrong.get(status.name, 0) + 1

    def figures(self) -> dict[str, object]:
        """For JSON; a percentile of nothing is null."""
        spread = {f"p{share}_s": percentile(self.seconds, share) if self.seconds else None for share in (50, 99)}
        return {"name": self.case.name, "num_refused": len(self.seconds), "wrong": self.wrong, **spread}

    def line(self) -> str:
        """One row of the table."""
        measured = self.seconds or [float("nan")]
        spread = "".join(f"{1000 * percentile(measured, share):>10.2f}" for share in (50, 99))
        wrong = "".join(f"  {count} x {status}!" for status, count in self.wrong.items())
        return f"{self.case.name:<34}{len(self.seconds):>8}{spread}{wrong}"


def cases(model: Model) -> list[Case]:
    """A representative dozen and a few: wrong bytes, fields, sizes, combinations and names."""
    return [*_wrong_wire(), *_wrong_fields(), *_wrong_sizes(model), *_wrong_elsewhere()]


def _generate(**changes: object) -> bytes:
    """A request that would be right without the changes."""
    fields: dict[str, object] = {"prompt": types_pb2.Prompt(text="Once upon a time"), **changes}
    return inference_pb2.GenerateRequest(**fields).SerializeToString()  # type: ignore[arg-type]  # fields of it


def _wrong_wire() -> Iterator[Case]:
    yield Case("bytes that are no message", "Generate", b"\xff" * 64)
    # Field 2 (prompt), in it field 1 (text): two bytes that are not UTF-8.
    yield Case("text that is not UTF-8", "Generate", b"\x12\x04\x0a\x02\xff\xfe")
    yield Case("a method that is not there", "Generat", _generate(), (grpc.StatusCode.UNIMPLEMENTED,))
    yield Case("an empty message", "Generate", b"")


def _wrong_fields() -> Iterator[Case]:
    sampling, stop = types_pb2.SamplingParams, types_pb2.StopParams
    yield Case("top_p = 1.5", "Generate", _generate(sampling=sampling(top_p=1.5)))
    yield Case("temperature = NaN", "Generate", _generate(sampling=sampling(temperature=float("nan"))))
    yield Case("max_output_tokens = -1", "Generate", _generate(stop=stop(max_output_tokens=-1)))
    yield Case("an empty stop string", "Generate", _generate(stop=stop(stop_strings=[""])))
    yield Case("a request id with a line break", "Generate", _generate(options={"request_id": "a\nb"}))
    both = _generate(stop=stop(stop_strings=["."]), output=types_pb2.OutputOptions(omit_text=True))
    yield Case("stop strings without text", "Generate", both)
    yield Case("an unknown model", "Generate", _generate(model="models/none"), (grpc.StatusCode.NOT_FOUND,))


def _wrong_sizes(model: Model) -> Iterator[Case]:
    outside = types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=[0, model.vocab_size]))
    yield Case("a token id outside", "Generate", _generate(prompt=outside))
    too_long = types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=[0] * (model.max_context_tokens + 1)))
    yield Case("a prompt longer than the context", "Generate", _generate(prompt=too_long))
    too_large = types_pb2.Prompt(text="many words " * 800_000)
    yield Case("a text of 8.8 MB", "Generate", _generate(prompt=too_large), _TOO_LARGE)
    stops = types_pb2.StopParams(stop_strings=[str(number) for number in range(10_000)])
    yield Case("10,000 stop strings", "Generate", _generate(stop=stops))


def _wrong_elsewhere() -> Iterator[Case]:
    inner = inference_pb2.GenerateRequest.FromString(_generate())
    chunks = inference_pb2.StreamGenerateRequest(
        request=inner, stream=inference_pb2.StreamOptions(min_chunk_tokens=5000)
    )
    yield Case("a stream in chunks of 5,000", "StreamGenerate", chunks.SerializeToString())
    yield Case("a chat without messages", "Chat", inference_pb2.ChatRequest().SerializeToString())
    turn = types_pb2.Message(content="Who speaks?")
    nobody = inference_pb2.ChatRequest(conversation=types_pb2.Conversation(messages=[turn]))
    yield Case("a turn without a role", "Chat", nobody.SerializeToString())
    score = inference_pb2.ScoreRequest(context=types_pb2.Prompt(text="Once"))
    yield Case("a score of nothing", "Score", score.SerializeToString())


async def _status(channel: grpc.aio.Channel, case: Case, metadata: Sequence[tuple[str, str]]) -> grpc.StatusCode:
    """The status that a call ends with; OK as soon as there is a response."""
    try:
        if case.method.startswith("Stream"):
            open_stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(case.path)
            stream = open_stream(case.body, metadata=metadata, timeout=_TIMEOUT_S)
            await stream.read()
            stream.cancel()
        else:
            invoke: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(case.path)
            await invoke(case.body, metadata=metadata, timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def _measure(options: argparse.Namespace, wrong: Sequence[Case]) -> list[Refusals]:
    """Every case `rounds` times by each of the clients, in turn, over one connection for each."""
    found = [Refusals(case) for case in wrong]
    metadata = [("authorization", f"Bearer {options.api_key}")] if options.api_key else []

    async def client() -> None:
        async with grpc.aio.insecure_channel(options.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            await asyncio.wait_for(channel.channel_ready(), _TIMEOUT_S)
            for _ in range(options.rounds):
                for refusals in found:
                    started = time.perf_counter()
                    status = await _status(channel, refusals.case, metadata)
                    refusals.add(time.perf_counter() - started, status)

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return found


async def _run(options: argparse.Namespace) -> int:
    async with AsyncClient(options.target, api_key=options.api_key, retries=0) as client:
        model = (await client.models.list())[0]
        found = await _measure(options, cases(model))
        await client.generate("Once upon a time", max_tokens=1)
    total = Refusals(Case("all", "", b""))
    for refusals in found:
        total.seconds += refusals.seconds
        for status, count in refusals.wrong.items():
            total.wrong[status] = total.wrong.get(status, 0) + count
    sys.stdout.write(f"{model.name}, {options.clients} clients\n")
    sys.stdout.write(f"{'milliseconds':<34}{'refused':>8}{'p50':>10}{'p99':>10}\n")
    sys.stdout.write("".join(refusals.line() + "\n" for refusals in [*found, total]))
    if options.json:
        settings = {"model": model.name, "clients": options.clients, "rounds": options.rounds}
        figures = {**settings, "total": total.figures(), "cases": [refusals.figures() for refusals in found]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return _judge(total, options.max_median_ms)


def _judge(total: Refusals, max_median_ms: float) -> int:
    """The exit code, and why on stderr."""
    if total.wrong:
        sys.stderr.write(f"error: {sum(total.wrong.values())} requests ended with another status than they should\n")
        return 1
    median_ms = 1000 * percentile(total.seconds, 50)
    if median_ms > max_median_ms:
        sys.stderr.write(f"error: the median is {median_ms:.1f} ms, above {max_median_ms} ms\n")
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code: 1 when a request was not refused, or too slowly."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.bad_input", description=__doc__)
    add = parser.add_argument
    add("--target", default=os.environ.get("PAWL_TARGET", "localhost:50051"), help="host:port of the server")
    add("--api-key", default=os.environ.get("PAWL_API_KEY"), help="default: PAWL_API_KEY")
    add("--rounds", type=positive, default=50, help="how often each client sends each request")
    add("--clients", type=positive, default=1, help="connections that send at the same time")
    add("--max-median-ms", type=float, default=100.0, help="the run fails when the median of all is above")
    add("--json", type=Path, help="write the figures here")
    try:
        return asyncio.run(_run(parser.parse_args(arguments)))
    except (PawlError, TimeoutError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
