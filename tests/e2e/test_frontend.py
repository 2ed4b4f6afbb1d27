"""The calls of a front end over real sockets, with a fake engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2

from pawl.v1 import admin_pb2, inference_pb2, model_pb2, tokenizer_pb2, types_pb2
from pawl_server.internal.v1 import engine_pb2
from tests.fakes.fake_engine import ids_of
from tests.fakes.front_end import RunningFrontEnd, front_end, health_stub
from tests.fakes.tokenizer import CONTEXT, EOS_ID, VOCAB_SIZE, write_checkpoint


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningFrontEnd]:
    async with front_end(write_checkpoint(tmp_path / "toy")) as running:
        yield running


def _request(text: str = "hello", **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=types_pb2.Prompt(text=text), **fields)


def _stop(**fields: Any) -> types_pb2.StopParams:
    return types_pb2.StopParams(**fields)


def _replies(server: RunningFrontEnd, text: str | Sequence[int]) -> None:
    ids = ids_of(text) if isinstance(text, str) else list(text)
    server.engine.reply = lambda _submit: ids


async def _events(call: Any) -> list[inference_pb2.StreamGenerateResponse]:
    return [event async for event in call]


async def test_generate_continues_a_prompt(server: RunningFrontEnd) -> None:
    call = server.inference.Generate(_request(stop=_stop(max_output_tokens=5)))
    answer = await call
    assert answer.samples[0].text == "cdefg"
    assert answer.samples[0].finish_reason == types_pb2.FINISH_REASON_MAX_TOKENS
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens, answer.usage.cached_prompt_tokens) == (2, 5, 3)
    assert answer.model == "toy"
    assert not answer.HasField("timings")
    assert answer.seed == server.engine.submits[0].sampling.seed
    assert dict(await call.initial_metadata())["pawl-request-id"] == answer.request_id


async def test_a_hint_to_keep_the_prefix_reaches_the_engine(server: RunningFrontEnd) -> None:
    for options in (types_pb2.RequestOptions(retain_prefix=duration_pb2.Duration(seconds=90, nanos=500_000_000)), None):
        await server.inference.Generate(_request(stop=_stop(max_output_tokens=1), options=options))
    assert [submit.retain_prefix_s for submit in server.engine.submits] == [90.5, 0.0]


async def test_unset_is_the_models_default_and_zero_is_zero(server: RunningFrontEnd) -> None:
    await server.inference.Generate(_request(stop=_stop(max_output_tokens=1)))
    sampling = types_pb2.SamplingParams(temperature=0.0, seed=0, min_p=0.0)
    answer = await server.inference.Generate(_request(sampling=sampling, stop=_stop(max_output_tokens=1)))
    unset, zero = (submit.sampling for submit in server.engine.submits)
    assert (unset.temperature, unset.top_p, unset.top_k, unset.repetition_penalty) == (0.6, 0.9, 0, 1.0)
    assert (zero.temperature, zero.top_p, zero.seed) == (0.0, 0.9, 0)
    assert answer.seed == 0
    assert not unset.HasField("logprobs")


async def test_stream_has_one_start_contiguous_deltas_and_one_end(server: RunningFrontEnd) -> None:
    request = _request(
        stop=_stop(max_output_tokens=20),
        output=types_pb2.OutputOptions(token_ids=True, timings=True),
        options=types_pb2.RequestOptions(request_id="mine"),
    )
    events = await _events(server.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request)))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "start"
    assert kinds[-2:] == ["sample_end", "end"]
    assert set(kinds[1:-2]) == {"delta"}
    deltas = [event.delta for event in events[1:-2]]
    assert "".join(delta.text for delta in deltas) == "cdefghijklmnopqrstuv"
    offset = 0
    for delta in deltas:
        assert (delta.token_offset, delta.token_count) == (offset, len(delta.token_ids))
        offset += delta.token_count
    assert offset == events[-2].sample_end.output_tokens == events[-1].end.usage.output_tokens == 20
    assert events[0].start.request_id == "mine"
    times = events[-1].end.timings
    parts = (times.queue, times.prefill, times.decode, times.stalled)
    assert sum(part.ToNanoseconds() for part in parts) == times.total.ToNanoseconds() > 0
    assert times.prefill.ToNanoseconds() == 1_000_000


@pytest.mark.parametrize("per_cut", ["hello world END more", "hello world E"])
async def test_stop_string_over_token_borders_cuts_the_text(server: RunningFrontEnd, per_cut: str) -> None:
    _replies(server, ids_of(per_cut) if "more" in per_cut else [*ids_of(per_cut), EOS_ID])
    server.engine.hold_after = len(ids_of("hello world END"))  # what comes after the match is never needed
    stop = _stop(stop_strings=["END", "nothing"])
    answer = await server.inference.Generate(_request(stop=stop, output=types_pb2.OutputOptions(token_ids=True)))
    sample = answer.samples[0]
    if "more" in per_cut:
        assert (sample.text, sample.stop_match.stop_string) == ("hello world ", "END")
        assert answer.usage.output_tokens == len(sample.token_ids) == len(ids_of("hello world END"))
        await server.engine.seen(lambda: bool(server.engine.aborts))
        assert server.engine.aborts[0][1] == engine_pb2.ABORT_REASON_STOP_STRING
    else:
        # What was held back for a match that never came is delivered at the end.
        assert (sample.text, sample.stop_match.eos_token_id) == ("hello world E", EOS_ID)
        assert sample.stop_match.WhichOneof("match") == "eos_token_id"


async def test_stop_string_may_be_included_and_waits_for_the_minimum(server: RunningFrontEnd) -> None:
    _replies(server, "xENDyENDz")
    stop = _stop(stop_strings=["END"], include_stop=True, min_output_tokens=4)
    answer = await server.inference.Generate(_request(stop=stop))
    assert answer.samples[0].text == "xENDyEND"
    assert answer.usage.output_tokens == 8


async def test_hidden_stop_tokens_are_counted_and_not_shown(server: RunningFrontEnd) -> None:
    x = ids_of("x")[0]
    _replies(server, [x, x, EOS_ID])
    output = types_pb2.OutputOptions(token_ids=True, logprobs=2)
    answer = await server.inference.Generate(_request(output=output))
    sample = answer.samples[0]
    assert (sample.text, list(sample.token_ids), answer.usage.output_tokens) == ("xx", [x, x], 3)
    assert [len(entry.alternatives) for entry in sample.logprobs] == [2, 2]
    assert sample.logprobs[0].token_bytes == b"x"
    shown = types_pb2.OutputOptions(token_ids=True, logprobs=0, skip_special_tokens=False)
    answer = await server.inference.Generate(_request(stop=_stop(include_stop=True), output=shown))
    sample = answer.samples[0]
    assert (sample.text, list(sample.token_ids), len(sample.logprobs)) == ("xx<|end|>", [x, x, EOS_ID], 3)
    assert sample.finish_reason == types_pb2.FINISH_REASON_STOP


async def test_own_stop_tokens_and_ignore_eos(server: RunningFrontEnd) -> None:
    x, y = ids_of("xy")
    _replies(server, [x, EOS_ID, x, y, x])
    answer = await server.inference.Generate(_request(stop=_stop(stop_token_ids=[y], ignore_eos=True)))
    assert answer.samples[0].stop_match.stop_token_id == y
    assert answer.usage.output_tokens == 4
    assert list(server.engine.submits[0].eos_token_ids) == []


async def test_characters_are_never_cut(server: RunningFrontEnd) -> None:
    text = "a\N{EURO SIGN}\N{GRINNING FACE}z"
    _replies(server, [*ids_of(text), EOS_ID])
    events = await _events(server.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(request=_request("x"))))
    pieces = [event.delta.text for event in events if event.HasField("delta")]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


async def test_omitted_text_and_prompt_logprobs(server: RunningFrontEnd) -> None:
    output = types_pb2.OutputOptions(omit_text=True, token_ids=True, prompt_logprobs=1)
    answer = await server.inference.Generate(_request("hello!?", stop=_stop(max_output_tokens=2), output=output))
    assert answer.samples[0].text == ""
    assert len(answer.samples[0].token_ids) == 2
    entries = answer.prompt_logprobs
    assert [entry.token_id for entry in entries] == [0, *ids_of("hello!?")]
    assert not entries[0].HasField("logprob")
    assert all(entry.HasField("logprob") and len(entry.alternatives) == 1 for entry in entries[1:])


async def test_chat_runs_the_rendered_prompt(server: RunningFrontEnd) -> None:
    conversation = types_pb2.Conversation(
        messages=[types_pb2.Message(role=types_pb2.ROLE_USER, content="hi")], template_kwargs={"mood": "calm"}
    )
    rendered = await server.tokenizer.RenderChat(tokenizer_pb2.RenderChatRequest(conversation=conversation))
    assert rendered.text == "<|begin|><|user|>hi<|end|>(calm)<|assistant|>"
    request = inference_pb2.ChatRequest(conversation=conversation, stop=_stop(max_output_tokens=3))
    answer = await server.inference.Chat(request)
    assert len(answer.response.samples[0].text) == 3
    assert list(server.engine.submits[0].prompt_ids) == list(rendered.token_ids)
    streamed = inference_pb2.StreamChatRequest(request=request)
    events = [event async for event in server.inference.StreamChat(streamed)]
    assert events[-1].end.usage.output_tokens == 3


async def test_score_computes_the_context_once(server: RunningFrontEnd) -> None:
    request = inference_pb2.ScoreRequest(
        context=types_pb2.Prompt(text="hello"),
        continuations=[types_pb2.Prompt(text=text) for text in ("a", "bcd", " world")],
        alternatives=2,
    )
    answer = await server.inference.Score(request)
    assert [len(item.tokens) for item in answer.continuations] == [1, 3, 1]
    assert answer.continuations[1].total_logprob == pytest.approx(-1.5)
    assert [item.byte_count for item in answer.continuations] == [1, 3, 6]
    for item in answer.continuations:
        assert item.greedy_match == all(entry.rank == 1 for entry in item.tokens)
        assert all(len(entry.alternatives) == 2 for entry in item.tokens)
    assert answer.usage.prompt_tokens == 2 + 5
    assert {submit.max_output_tokens for submit in server.engine.submits} == {0}
    assert {submit.prompt_logprobs_from for submit in server.engine.submits} == {2}


async def test_tokenizer_calls(server: RunningFrontEnd) -> None:
    texts = ["hello \N{EURO SIGN}", ""]
    answer = await server.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(texts=texts, offsets=True))
    first = answer.results[0]
    assert first.tokens[0].special
    assert b"".join(token.bytes for token in first.tokens[1:]) == texts[0].encode()
    assert (first.tokens[1].start_byte, first.tokens[1].end_byte) == (0, 5)
    assert answer.results[1].token_count == 1
    assert answer.max_context_tokens == CONTEXT
    sequences = [types_pb2.TokenIds(ids=first.token_ids)]
    hidden = await server.tokenizer.Detokenize(tokenizer_pb2.DetokenizeRequest(sequences=sequences))
    assert list(hidden.texts) == [texts[0]]
    request = tokenizer_pb2.DetokenizeRequest(sequences=sequences, skip_special_tokens=False)
    assert list((await server.tokenizer.Detokenize(request)).texts) == ["<|begin|>" + texts[0]]


async def test_model_calls(server: RunningFrontEnd) -> None:
    listed = await server.models.ListModels(model_pb2.ListModelsRequest())
    assert listed.next_page_token == ""
    model = (await server.models.GetModel(model_pb2.GetModelRequest(name="models/toy"))).model
    assert listed.models[0] == model
    assert (model.vocab_size, model.max_context_tokens, list(model.eos_token_ids)) == (VOCAB_SIZE, CONTEXT, [EOS_ID])
    assert model.default_sampling.temperature == 0.6
    assert not model.default_sampling.HasField("top_k")
    assert model.has_chat_template
    request = _request(model="models/toy", stop=_stop(max_output_tokens=1))
    assert (await server.inference.Generate(request)).model == "toy"


async def test_chunks_are_joined(server: RunningFrontEnd) -> None:
    stream = inference_pb2.StreamOptions(min_chunk_tokens=8)
    request = inference_pb2.StreamGenerateRequest(request=_request(stop=_stop(max_output_tokens=20)), stream=stream)
    events = await _events(server.inference.StreamGenerate(request))
    counts = [event.delta.token_count for event in events if event.HasField("delta")]
    assert sum(counts) == 20
    assert all(count >= 8 for count in counts[:-1])


async def test_admin_calls(server: RunningFrontEnd) -> None:
    info = await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
    assert (info.block_size, info.block_count, info.replica_count, info.max_running_requests) == (16, 100, 1, 8)
    assert info.config["frontend.max_queued_requests"] == "256"
    assert info.config["security.internal_token"] in ("", "***")
    watch: Any = server.admin.WatchLoad(
        admin_pb2.WatchLoadRequest(min_interval=duration_pb2.Duration(nanos=100_000_000))
    )
    first = (await watch.read()).load
    assert first.block_count == 100
    assert first.workers[0].state == admin_pb2.WORKER_STATE_READY
    server.engine.hold_after = 1
    calls = [server.inference.Generate(_request(stop=_stop(max_output_tokens=3))) for _ in range(3)]
    await server.engine.seen(lambda: len(server.engine.live) == 3)
    async with asyncio.timeout(10):
        while (await watch.read()).load.running_requests != 3:
            pass
    watch.cancel()
    page = await server.admin.ListRequests(admin_pb2.ListRequestsRequest(page_size=2))
    assert page.requests[1].wait_reason == "blocks: needs 4, 1 free"
    rest = await server.admin.ListRequests(admin_pb2.ListRequestsRequest(page_token=page.next_page_token))
    assert rest.next_page_token == ""
    ids = [state.request_id for state in (*page.requests, *rest.requests)]
    server.engine.release.set()
    assert sorted(ids) == sorted([(await call).request_id for call in calls])
    flushed = await server.admin.FlushPrefixCache(admin_pb2.FlushPrefixCacheRequest())
    assert (flushed.freed_block_count, server.engine.flushed) == (7, 1)


async def test_admin_is_not_on_the_public_port(server: RunningFrontEnd) -> None:
    method: Any = server.channel.unary_unary("/pawl.v1.AdminService/Drain")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_follows_the_replicas(server: RunningFrontEnd) -> None:
    health = health_stub(server.channel)

    async def status(name: str) -> int:
        answer: health_pb2.HealthCheckResponse = await health.Check(health_pb2.HealthCheckRequest(service=name))
        return answer.status

    async def becomes(name: str, wanted: int) -> None:
        async with asyncio.timeout(10):
            while await status(name) != wanted:
                await asyncio.sleep(0.01)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", "liveness", "readiness", "pawl.v1.InferenceService", "pawl.v1.TokenizerService"):
        await becomes(name, serving)
    server.engine.progressing = False
    server.engine.tell_load()
    await becomes("readiness", not_serving)
    assert await status("liveness") == serving
    server.engine.progressing = True
    await becomes("pawl.v1.InferenceService", serving)
    await server.engine.kill()
    await becomes("", not_serving)
    assert await status("liveness") == serving


async def test_metrics_count_every_request_once(server: RunningFrontEnd) -> None:
    await server.inference.Generate(_request(stop=_stop(max_output_tokens=4)))
    with pytest.raises(grpc.aio.AioRpcError):
        await server.inference.Generate(_request(sampling=types_pb2.SamplingParams(top_p=2.0)))
    text = (await asyncio.to_thread(_scrape, server.addresses.metrics)).decode()
    assert 'pawl_requests_total{method="Generate",model="toy",outcome="max_tokens"} 1.0' in text
    assert 'pawl_requests_total{method="Generate",model="toy",outcome="rejected"} 1.0' in text
    assert 'pawl_request_duration_seconds_count{model="toy",phase="total"} 1.0' in text
    ok = 'grpc_code="OK",grpc_method="Generate",grpc_service="pawl.v1.InferenceService",grpc_type="unary"'
    assert f"grpc_server_handled_total{{{ok}}} 1.0" in text
    assert 'pawl_frontend_streams_open{model="toy"} 0.0' in text


def _scrape(address: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return bytes(answer.read())
