"""Messages of the wire to the SDK's types: the one place where the two meet on the way in.

Owns every from-proto conversion of calls about models; `_core` builds what goes out. Enum values that this
version does not know become the closest honest thing, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TypeAlias

from google.protobuf import duration_pb2, timestamp_pb2

from pawl._events import Delta, End, Event, SampleEnd, Start
from pawl._inputs import Sampling
from pawl._types import (
    Alternative,
    CancelOutcome,
    Completion,
    FinishReason,
    Model,
    RenderedChat,
    Sample,
    ScoredContinuation,
    Scores,
    StopMatch,
    Timings,
    Token,
    Tokenization,
    TokenLogprob,
    Usage,
)
from pawl.v1 import inference_pb2, model_pb2, tokenizer_pb2, types_pb2

__all__ = [
    "StreamMessage",
    "cancel_outcomes",
    "completion",
    "event",
    "instant",
    "model",
    "rendered_chat",
    "scores",
    "seconds",
    "tokenization",
]

StreamMessage: TypeAlias = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse

_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_MAX_TOKENS: FinishReason.MAX_TOKENS,
    types_pb2.FINISH_REASON_CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
    types_pb2.FINISH_REASON_TIME_LIMIT: FinishReason.TIME_LIMIT,
    types_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_CANCEL_OUTCOMES = {
    inference_pb2.CANCEL_OUTCOME_CANCELLED: CancelOutcome.CANCELLED,
    inference_pb2.CANCEL_OUTCOME_NOT_FOUND: CancelOutcome.NOT_FOUND,
    inference_pb2.CANCEL_OUTCOME_ALREADY_FINISHED: CancelOutcome.ALREADY_FINISHED,
}


def seconds(duration: duration_pb2.Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def instant(timestamp: timestamp_pb2.Timestamp) -> datetime | None:
    """A time in UTC; None for one that was not set."""
    if not timestamp.seconds and not timestamp.nanos:
        return None
    return timestamp.ToDatetime(tzinfo=UTC)


def _stop_match(message: types_pb2.StopMatch) -> StopMatch | None:
    match message.WhichOneof("match"):
        case "eos_token_id":
            return StopMatch(eos_token_id=message.eos_token_id)
        case "stop_token_id":
            return StopMatch(stop_token_id=message.stop_token_id)
        case "stop_string":
            return StopMatch(stop_string=message.stop_string)
        case _:
            return None


def _finish_reason(value: types_pb2.FinishReason.ValueType) -> FinishReason:
    # A reason of a newer server: the output is complete, which is what STOP says.
    return _FINISH_REASONS.get(value, FinishReason.STOP)


def _logprob(message: types_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        token_bytes=message.token_bytes,
        logprob=message.logprob if message.HasField("logprob") else None,
        rank=message.rank,
        alternatives=tuple(Alternative(a.token_id, a.token_bytes, a.logprob, a.rank) for a in message.alternatives),
    )


def _logprobs(messages: Iterable[types_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(_logprob(message) for message in messages)


def _usage(message: types_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_prompt_tokens, message.output_tokens)


def _timings(message: types_pb2.Timings) -> Timings:
    return Timings(
        queue=seconds(message.queue),
        prefill=seconds(message.prefill),
        decode=seconds(message.decode),
        stalled=seconds(message.stalled),
        total=seconds(message.total),
        time_to_first_token=seconds(message.time_to_first_token),
        preemption_count=message.preemption_count,
        output_tokens_per_second=message.output_tokens_per_second,
    )


def completion(message: inference_pb2.GenerateResponse) -> Completion:
    """A finished completion."""
    samples = tuple(_sample(sample) for sample in message.samples or [types_pb2.Sample()])
    first = samples[0]
    return Completion(
        text=first.text,
        finish_reason=first.finish_reason,
        stop_match=first.stop_match,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        samples=samples,
        usage=_usage(message.usage),
        timings=_timings(message.timings) if message.HasField("timings") else None,
        request_id=message.request_id,
        model=message.model,
        seed=message.seed,
        created=instant(message.create_time),
    )


def _sample(message: types_pb2.Sample) -> Sample:
    return Sample(
        index=message.index,
        text=message.text,
        finish_reason=_finish_reason(message.finish_reason),
        stop_match=_stop_match(message.stop_match),
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
    )


def _start(message: StreamMessage) -> Event:
    start = message.start
    return Start(start.request_id, start.model, start.seed, instant(start.create_time))


def _delta(message: StreamMessage) -> Event:
    delta = message.delta
    return Delta(
        text=delta.text,
        token_offset=delta.token_offset,
        token_count=delta.token_count,
        token_ids=tuple(delta.token_ids),
        logprobs=_logprobs(found) if (found := delta.logprobs) else (),
        index=delta.index,
    )


def _sample_end(message: StreamMessage) -> Event:
    end = message.sample_end
    return SampleEnd(_finish_reason(end.finish_reason), _stop_match(end.stop_match), end.output_tokens, end.index)


def _end(message: StreamMessage) -> Event:
    end = message.end
    timings = _timings(end.timings) if end.HasField("timings") else None
    return End(_usage(end.usage), timings, _logprobs(end.prompt_logprobs))


_EVENTS: dict[str, Callable[[StreamMessage], Event]] = {
    "start": _start,
    "delta": _delta,
    "sample_end": _sample_end,
    "end": _end,
}


def event(message: StreamMessage) -> Event | None:
    """One message of a stream; None for a kind of event that this version does not know."""
    make = _EVENTS.get(message.WhichOneof("event") or "")
    return make(message) if make else None


def scores(message: inference_pb2.ScoreResponse) -> Scores:
    """The scores of a call."""
    continuations = tuple(
        ScoredContinuation(_logprobs(c.tokens), c.total_logprob, c.greedy_match, c.byte_count)
        for c in message.continuations
    )
    return Scores(continuations, message.request_id, _usage(message.usage))


def cancel_outcomes(message: inference_pb2.CancelResponse) -> dict[str, CancelOutcome]:
    """What became of each request id."""
    return {
        request_id: _CANCEL_OUTCOMES.get(outcome, CancelOutcome.NOT_FOUND)
        for request_id, outcome in message.outcomes.items()
    }


def tokenization(message: tokenizer_pb2.TokenizeResponse) -> Tokenization:
    """The tokens of the only text."""
    result = message.results[0] if message.results else tokenizer_pb2.Tokenization()
    tokens = tuple(Token(t.id, t.bytes, t.start_byte, t.end_byte, t.special) for t in result.tokens)
    return Tokenization(tuple(result.token_ids), tokens, message.max_context_tokens)


def rendered_chat(message: tokenizer_pb2.RenderChatResponse) -> RenderedChat:
    """A rendered conversation."""
    return RenderedChat(message.text, tuple(message.token_ids))


def _sampling(message: types_pb2.SamplingParams) -> Sampling:
    given = {field.name: value for field, value in message.ListFields() if field.name != "logit_bias"}
    return Sampling(**given, logit_bias=dict(message.logit_bias) or None)


def model(message: model_pb2.Model) -> Model:
    """Facts about a model."""
    return Model(
        name=message.name,
        display_name=message.display_name,
        architectures=tuple(message.architectures),
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
        data_type=message.data_type,
        eos_token_ids=tuple(message.eos_token_ids),
        default_sampling=_sampling(message.default_sampling),
        has_chat_template=message.has_chat_template,
        revision=message.revision,
    )
