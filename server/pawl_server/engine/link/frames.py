"""Frames of the link to the scheduler's types and back: the one place on the engine's side that knows both."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pawl.errors import FieldViolation, InvalidRequest, PawlError
from pawl_server.engine.grammar.constraint import Constraint
from pawl_server.internal.v1 import engine_pb2
from pawl_server.kv.events import CacheEvent, PrefixesUnknown, PrefixRemoved, PrefixStored
from pawl_server.scheduler.admission import Refusal
from pawl_server.scheduler.endings import Ended, EndReason
from pawl_server.scheduler.sequence import SequenceRequest, Sibling
from pawl_server.scheduler.state import SequenceView
from pawl_workers.plan import PromptLogprobs, SamplingSpec, TokenLogprobs

__all__ = [
    "SequenceKey",
    "abort_text",
    "refused_end",
    "to_cache_events",
    "to_end",
    "to_failed_end",
    "to_position",
    "to_prompt_logprobs",
    "to_refused_end",
    "to_request",
    "to_sequence_state",
]

# A sequence inside an engine: the number of its connection, and its number on that connection.
SequenceKey = tuple[int, int]

_REASONS = {
    EndReason.EOS: engine_pb2.END_REASON_EOS,
    EndReason.STOP_TOKEN: engine_pb2.END_REASON_STOP_TOKEN,
    EndReason.MAX_TOKENS: engine_pb2.END_REASON_MAX_TOKENS,
    EndReason.CONTEXT_LENGTH: engine_pb2.END_REASON_CONTEXT_LENGTH,
    EndReason.ABORTED: engine_pb2.END_REASON_ABORTED,
    EndReason.FAILED: engine_pb2.END_REASON_FAILED,
}


def to_request(submit: engine_pb2.Submit, key: SequenceKey, vocab_size: int) -> SequenceRequest:
    """The scheduler's request of a Submit.

    Raises:
        InvalidRequest: a token id lies outside the vocabulary; on a device it would take the whole step with it. Or a
            sample has no seed.
    """
    if len(submit.sample_handles) != len(submit.sample_seeds):
        message = f"{len(submit.sample_handles)} further samples and {len(submit.sample_seeds)} seeds"
        raise InvalidRequest(message, reason="BAD_SAMPLES")
    prompt_ids, resume_ids = list(submit.prompt_ids), list(submit.resume_ids)
    _check_ids("prompt", prompt_ids, vocab_size)
    _check_ids("resume_ids", resume_ids, vocab_size)
    _check_ids("sampling.logit_bias", list(submit.sampling.logit_bias), vocab_size)
    constraint = _constraint(submit)
    # Under a constraint the masks keep the end of text away: as long as anything else can follow.
    least = submit.min_output_tokens if constraint is None else 0
    eos, stops = frozenset(submit.eos_token_ids), frozenset(submit.stop_token_ids)
    return SequenceRequest(
        handle=key,
        request_id=submit.request_id,
        prompt_ids=prompt_ids,
        resume_ids=resume_ids,
        sampling=_sampling(submit, least, tuple(sorted(i for i in eos | stops if 0 <= i < vocab_size))),
        max_output_tokens=submit.max_output_tokens,
        min_output_tokens=least,
        eos_token_ids=eos,
        stop_token_ids=stops,
        prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else -1,
        prompt_logprobs_from=max(1, submit.prompt_logprobs_from),
        cache_key=submit.cache_key,
        bypass_prefix_cache=submit.bypass_prefix_cache,
        retain_prefix_s=submit.retain_prefix_s,
        priority=submit.priority,
        user=submit.user,
        tenant=submit.tenant,
        weight=submit.weight if submit.weight > 0 else 1.0,
        siblings=[
            Sibling((key[0], handle), seed)
            for handle, seed in zip(submit.sample_handles, submit.sample_seeds, strict=True)
        ],
        constraint=constraint,
    )


def _constraint(submit: engine_pb2.Submit) -> Constraint | None:
    kind = submit.WhichOneof("constraint")
    if kind is None:
        return None
    source = json.dumps(list(submit.choices.values)) if kind == "choices" else str(getattr(submit, kind))
    return Constraint(kind, source, submit.min_output_tokens)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        message = f"token id {wrong} is outside the vocabulary of {vocab_size} ids"
        raise InvalidRequest(
            f"{field}: {message}", reason="TOKEN_OUT_OF_RANGE", violations=[FieldViolation(field, message)]
        )


def _sampling(submit: engine_pb2.Submit, min_output_tokens: int, suppressed: tuple[int, ...]) -> SamplingSpec:
    given = submit.sampling
    return SamplingSpec(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=dict(given.logit_bias),
        seed=given.seed,
        min_output_tokens=min_output_tokens,
        suppressed_ids=suppressed if min_output_tokens > 0 else (),
        logprobs=given.logprobs if given.HasField("logprobs") else -1,
    )


def to_position(logprobs: TokenLogprobs) -> engine_pb2.PositionLogprobs:
    """One position of log-probabilities."""
    return engine_pb2.PositionLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        alternative_ids=logprobs.alternative_ids,
        alternative_logprobs=logprobs.alternative_logprobs,
    )


def to_prompt_logprobs(handle: int, scored: PromptLogprobs) -> engine_pb2.PromptLogprobs:
    """A stretch of prompt log-probabilities."""
    return engine_pb2.PromptLogprobs(
        handle=handle,
        first_position=scored.first_position,
        positions=[to_position(position) for position in scored.positions],
    )


def to_end(handle: int, ended: Ended) -> engine_pb2.End:
    """The terminal event of a sequence that was admitted."""
    end = engine_pb2.End(
        handle=handle,
        reason=_REASONS[ended.reason],
        stop_token_id=max(0, ended.stop_token_id),
        cached_prompt_tokens=ended.cached_prompt_tokens,
        output_tokens=ended.output_tokens,
        prefill_s=ended.prefill_s,
        decode_s=ended.decode_s,
        stalled_s=ended.stalled_s,
        preemption_count=ended.preemption_count,
    )
    if ended.reason is EndReason.FAILED and ended.field:
        end.error.code, end.error.reason = "invalid_request", "CONSTRAINT_FAILED"
        end.error.message, end.error.field = ended.detail, ended.field
    elif ended.reason is EndReason.FAILED:
        end.error.CopyFrom(_internal("SEQUENCE_FAILED", ended.detail))
    return end


def to_failed_end(handle: int, ended: Ended, message: str) -> engine_pb2.End:
    """The terminal event of a sequence whose steps crash the worker."""
    end = to_end(handle, ended)
    end.reason = engine_pb2.END_REASON_FAILED
    end.error.CopyFrom(_internal("WORKER_FAILED", message))
    return end


def _internal(reason: str, message: str) -> engine_pb2.EngineError:
    return engine_pb2.EngineError(code="internal", reason=reason, message=message)


def to_refused_end(handle: int, refusal: Refusal) -> engine_pb2.End:
    """The terminal event of a sequence that the scheduler did not take."""
    error = engine_pb2.EngineError(
        code=refusal.code,
        reason=refusal.reason,
        message=refusal.message,
        field=refusal.field,
        metadata=refusal.metadata,
    )
    return engine_pb2.End(handle=handle, reason=engine_pb2.END_REASON_REFUSED, error=error)


def refused_end(handle: int, error: PawlError) -> engine_pb2.End:
    """The terminal event of a sequence that did not even reach the scheduler."""
    field = error.violations[0].field if error.violations else ""
    refused = engine_pb2.EngineError(
        code=error.code, reason=error.reason, message=error.message, field=field, metadata=error.metadata
    )
    return engine_pb2.End(handle=handle, reason=engine_pb2.END_REASON_REFUSED, error=refused)


def abort_text(reason: engine_pb2.AbortReason.ValueType) -> str:
    """Why a front end ended a sequence, as a lower-case word: "stop_string", "cancelled", ..."""
    known = reason in engine_pb2.AbortReason.values()
    return engine_pb2.AbortReason.Name(reason).removeprefix("ABORT_REASON_").lower() if known else "unknown"


def to_cache_events(events: Sequence[CacheEvent]) -> engine_pb2.CacheEvents:
    """Changes of the prefix cache, oldest first."""
    frame = engine_pb2.CacheEvents()
    for event in events:
        match event:
            case PrefixStored(name, parent, namespace, num_tokens):
                frame.events.add(name=name, parent=parent, namespace=namespace, num_tokens=num_tokens)
            case PrefixRemoved(name):
                frame.events.add(name=name)
            case PrefixesUnknown():
                frame.reset = True
    return frame


def to_sequence_state(view: SequenceView) -> engine_pb2.SequenceState:
    """One line of ListSequences."""
    return engine_pb2.SequenceState(
        request_id=view.request_id,
        phase=view.phase,
        prompt_tokens=view.prompt_tokens,
        output_tokens=view.output_tokens,
        num_blocks=view.num_blocks,
        age_s=view.age_s,
        preemption_count=view.preemption_count,
        wait_reason=view.wait_reason,
        user=view.user,
        priority=view.priority,
        tenant=view.tenant,
        preemption_reason=view.preemption_reason,
        lost_tokens=view.lost_tokens,
        queue_position=view.queue_position,
    )
