"""Results to protobuf: the one place of the front end where answers take their public form.

Pure functions; owns the exact sum of `Timings` and knows nothing of streams or sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import duration_pb2, timestamp_pb2

from pawl.errors import FieldViolation, InvalidRequest, PawlError, error_class_for_code
from pawl.v1 import inference_pb2, types_pb2
from pawl_server.frontend.detokenize import TokenBytes
from pawl_server.frontend.mailbox import Delta
from pawl_server.frontend.requests import OutputChoice
from pawl_server.internal.v1 import engine_pb2

__all__ = [
    "Finish",
    "Phases",
    "engine_error",
    "fill_delta",
    "phases",
    "prompt_logprobs",
    "sample",
    "sample_end",
    "timestamp",
    "timings",
    "token_logprob",
]

_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Phases:
    """Where the time of a request went, nanoseconds. queue + prefill + decode + stalled = total, exactly."""

    queue: int
    prefill: int
    decode: int
    stalled: int
    total: int
    first_token: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Finish:
    """How an output ended, for the end messages.

    Attributes:
        outcome: one of `pawl_server.metrics.OUTCOMES`.
    """

    reason: types_pb2.FinishReason.ValueType
    outcome: str
    match: types_pb2.StopMatch | None
    usage: types_pb2.Usage
    phases: Phases
    prompt_logprobs: Sequence[engine_pb2.PositionLogprobs]


def phases(total_s: float, first_token_s: float, end: engine_pb2.End) -> Phases:
    """Split a request's time: the engine's own figures, and the rest as queue.

    Clocks of two processes differ; what the engine's figures have too much is taken from the longest of them,
    so that none is negative and the sum holds.
    """
    total = max(0, round(total_s * _SECOND))
    parts = [max(0, round(value * _SECOND)) for value in (end.prefill_s, end.decode_s, end.stalled_s)]
    while (excess := sum(parts) - total) > 0:
        largest = parts.index(max(parts))
        parts[largest] -= min(excess, parts[largest])
    prefill, decode, stalled = parts
    first = min(max(0, round(first_token_s * _SECOND)), total)
    return Phases(total - sum(parts), prefill, decode, stalled, total, first, end.preemption_count)


def timings(times: Phases, output_tokens: int) -> types_pb2.Timings:
    """The public message of `Phases`."""
    rate = (output_tokens - 1) * _SECOND / times.decode if output_tokens > 1 and times.decode else 0.0
    return types_pb2.Timings(
        queue=_duration(times.queue),
        prefill=_duration(times.prefill),
        decode=_duration(times.decode),
        stalled=_duration(times.stalled),
        total=_duration(times.total),
        time_to_first_token=_duration(times.first_token),
        preemption_count=times.preemptions,
        output_tokens_per_second=rate,
    )


def timestamp(unix_ns: int) -> timestamp_pb2.Timestamp:
    """A Timestamp of nanoseconds since 1970."""
    return timestamp_pb2.Timestamp(seconds=unix_ns // _SECOND, nanos=unix_ns % _SECOND)


def token_logprob(entry: engine_pb2.PositionLogprobs, token_bytes: TokenBytes) -> types_pb2.TokenLogprob:
    """One position, with the bytes of its tokens."""
    return types_pb2.TokenLogprob(
        token_id=entry.token_id,
        token_bytes=token_bytes[entry.token_id],
        logprob=entry.logprob,
        rank=entry.rank,
        alternatives=[
            types_pb2.Alternative(token_id=token_id, token_bytes=token_bytes[token_id], logprob=logprob, rank=rank)
            for rank, (token_id, logprob) in enumerate(
                zip(entry.alternative_ids, entry.alternative_logprobs, strict=True), start=1
            )
        ],
    )


def prompt_logprobs(
    first_id: int, entries: Sequence[engine_pb2.PositionLogprobs], token_bytes: TokenBytes
) -> list[types_pb2.TokenLogprob]:
    """One entry per prompt token; the first has no log-probability, since nothing precedes it."""
    first = types_pb2.TokenLogprob(token_id=first_id, token_bytes=token_bytes[first_id])
    return [first, *(token_logprob(entry, token_bytes) for entry in entries)]


def fill_delta(
    delta: inference_pb2.StreamDelta, index: int, piece: Delta, output: OutputChoice, token_bytes: TokenBytes
) -> None:
    """A piece of a sample's output, with what the caller asked for.

    Written into the message that is sent: one made by itself and copied there takes twice the time.
    """
    delta.index = index
    delta.token_offset = piece.offset
    delta.token_count = len(piece.token_ids)
    delta.text = piece.text
    if output.token_ids:
        delta.token_ids.extend(piece.token_ids)
    if output.logprobs is not None:
        delta.logprobs.extend([token_logprob(entry, token_bytes) for entry in piece.logprobs])


def sample_end(index: int, finish: Finish) -> inference_pb2.SampleEnd:
    """How a sample ended."""
    return inference_pb2.SampleEnd(
        index=index,
        finish_reason=finish.reason,
        stop_match=finish.match,
        output_tokens=finish.usage.output_tokens,
    )


def sample(index: int, whole: Delta, finish: Finish, output: OutputChoice, token_bytes: TokenBytes) -> types_pb2.Sample:
    """A whole sample, with what the caller asked for."""
    piece = inference_pb2.StreamDelta()
    fill_delta(piece, index, whole, output, token_bytes)
    return types_pb2.Sample(
        index=index,
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=piece.logprobs,
        finish_reason=finish.reason,
        stop_match=finish.match,
    )


def engine_error(error: engine_pb2.EngineError, request_id: str, path: str, retry_after: float | None) -> PawlError:
    """The public error of an engine's refusal or failure; `path` is put before the field that it names."""
    kind = error_class_for_code(error.code)
    violations = [FieldViolation(path + error.field, error.message)] if error.field else []
    return kind(
        error.message or "the engine failed",
        reason=error.reason,
        request_id=request_id,
        violations=violations if issubclass(kind, InvalidRequest) else (),
        metadata=dict(error.metadata),
        retry_after=retry_after if kind.retryable else None,
    )


def _duration(nanoseconds: int) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=nanoseconds // _SECOND, nanos=nanoseconds % _SECOND)
