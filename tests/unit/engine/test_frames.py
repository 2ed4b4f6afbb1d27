from __future__ import annotations

import pytest

from pawl.errors import InvalidRequest
from pawl_server.engine.link.frames import (
    abort_text,
    refused_end,
    to_end,
    to_failed_end,
    to_prompt_logprobs,
    to_request,
)
from pawl_server.internal.v1 import engine_pb2
from pawl_server.scheduler.endings import Ended, EndReason
from pawl_workers.plan import PromptLogprobs, TokenLogprobs
from tests.fakes.engine_harness import submit_frame


def _ended(reason: EndReason, **values: object) -> Ended:
    numbers: dict[str, object] = {
        "handle": (1, 2),
        "request_id": "r",
        "reason": reason,
        "detail": "why",
        "stop_token_id": -1,
        "cached_prompt_tokens": 3,
        "output_tokens": 4,
        "prefill_s": 0.5,
        "decode_s": 0.25,
        "stalled_s": 0.125,
        "preemption_count": 1,
        **values,
    }
    return Ended(**numbers)  # type: ignore[arg-type]


def test_a_submit_becomes_a_request_with_nothing_lost() -> None:
    submit = engine_pb2.Submit(
        handle=2,
        request_id="r",
        prompt_ids=[1, 2],
        resume_ids=[3],
        sampling=engine_pb2.Sampling(
            temperature=0.5,
            top_k=5,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            logit_bias={4: -1.5},
            seed=-7,
            logprobs=0,
        ),
        max_output_tokens=-1,
        min_output_tokens=2,
        eos_token_ids=[0],
        stop_token_ids=[9, 8],
        prompt_logprobs=0,
        prompt_logprobs_from=2,
        cache_key=b"key",
        bypass_prefix_cache=True,
        retain_prefix_s=2.5,
        priority=-1,
        user="u",
        tenant="t",
    )
    request = to_request(submit, (1, 2), vocab_size=10)
    assert (request.handle, request.request_id) == ((1, 2), "r")
    assert (list(request.prompt_ids), list(request.resume_ids)) == ([1, 2], [3])
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 5, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (sampling.logit_bias, sampling.seed, sampling.logprobs) == ({4: -1.5}, -7, 0)
    assert (sampling.min_output_tokens, sampling.suppressed_ids) == (2, (0, 8, 9))
    assert (request.max_output_tokens, request.min_output_tokens) == (-1, 2)
    assert (request.eos_token_ids, request.stop_token_ids) == (frozenset({0}), frozenset({8, 9}))
    assert (request.prompt_logprobs, request.prompt_logprobs_from) == (0, 2)
    assert (request.cache_key, request.bypass_prefix_cache, request.priority) == (b"key", True, -1)
    assert request.retain_prefix_s == 2.5
    assert (request.user, request.tenant) == ("u", "t")


def test_unset_log_probabilities_mean_none() -> None:
    request = to_request(submit_frame([1]), (1, 1), vocab_size=10)
    assert (request.sampling.logprobs, request.prompt_logprobs, request.prompt_logprobs_from) == (-1, -1, 1)
    assert request.sampling.suppressed_ids == ()


def test_suppressed_ids_lie_within_the_vocabulary() -> None:
    submit = submit_frame([1])
    submit.min_output_tokens = 1
    submit.stop_token_ids.extend([-3, 5, 10])
    assert to_request(submit, (1, 1), vocab_size=10).sampling.suppressed_ids == (5,)


def test_a_biased_id_outside_the_vocabulary_is_refused() -> None:
    submit = submit_frame([1])
    submit.sampling.logit_bias[10] = 1.0
    with pytest.raises(InvalidRequest, match="token id 10") as refused:
        to_request(submit, (1, 1), vocab_size=10)
    end = refused_end(6, refused.value)
    assert (end.handle, end.reason) == (6, engine_pb2.END_REASON_REFUSED)
    assert (end.error.code, end.error.field) == ("invalid_request", "sampling.logit_bias")


@pytest.mark.parametrize("reason", EndReason)
def test_every_end_reason_has_its_own_on_the_wire(reason: EndReason) -> None:
    end = to_end(2, _ended(reason))
    assert engine_pb2.EndReason.Name(end.reason) == f"END_REASON_{reason.name}"
    assert (end.cached_prompt_tokens, end.output_tokens, end.preemption_count) == (3, 4, 1)
    assert (end.prefill_s, end.decode_s, end.stalled_s) == (0.5, 0.25, 0.125)
    assert end.HasField("error") == (reason is EndReason.FAILED)


def test_a_stop_token_is_named() -> None:
    assert to_end(2, _ended(EndReason.STOP_TOKEN, stop_token_id=5)).stop_token_id == 5


def test_a_crashing_sequence_fails_as_internal() -> None:
    end = to_failed_end(2, _ended(EndReason.ABORTED), "planted")
    assert end.reason == engine_pb2.END_REASON_FAILED
    assert (end.error.code, end.error.reason, end.error.message) == ("internal", "WORKER_FAILED", "planted")


def test_prompt_log_probabilities_keep_their_positions() -> None:
    scored = PromptLogprobs(0, 3, [TokenLogprobs(7, -0.5, 2, [1, 7], [-0.25, -0.5])])
    frame = to_prompt_logprobs(9, scored)
    assert (frame.handle, frame.first_position) == (9, 3)
    (position,) = frame.positions
    assert (position.token_id, position.logprob, position.rank) == (7, -0.5, 2)
    assert list(position.alternative_ids) == [1, 7]
    assert list(position.alternative_logprobs) == [-0.25, -0.5]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (engine_pb2.ABORT_REASON_STOP_STRING, "stop_string"),
        (engine_pb2.ABORT_REASON_SLOW_READER, "slow_reader"),
        (99, "unknown"),
    ],
)
def test_abort_reasons_are_words(reason: engine_pb2.AbortReason.ValueType, text: str) -> None:
    assert abort_text(reason) == text
