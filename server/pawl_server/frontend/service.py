"""Generate, StreamGenerate, Chat, StreamChat, Score and Cancel: each is checked, run and answered here.

Thin: the checks are in `validate`, the run in `running` and `stream`, the messages in `convert`.
"""

# ruff: noqa: N802 - gRPC names the methods
from __future__ import annotations

import logging
import time
from typing import TypeVar

from pawl.v1 import inference_pb2, inference_pb2_grpc
from pawl_server.frontend import convert, validate, validate_other
from pawl_server.frontend.calls import Call, Context, current_call
from pawl_server.frontend.convert import Finish
from pawl_server.frontend.core import Core
from pawl_server.frontend.mailbox import Delta
from pawl_server.frontend.requests import GenerationRequest
from pawl_server.frontend.running import running
from pawl_server.frontend.samples import Samples, joint_finish
from pawl_server.frontend.score import score
from pawl_server.frontend.writer import Writer

__all__ = ["InferenceService"]

log = logging.getLogger(__name__)

StreamResponse = TypeVar("StreamResponse", inference_pb2.StreamGenerateResponse, inference_pb2.StreamChatResponse)


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The calls that need a replica."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """See the proto."""
        call = current_call()
        checked = validate.generation(request, self._core.rules(request.model, call.principal))
        return await self._whole(checked, call, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> inference_pb2.ChatResponse:
        """See the proto."""
        call = current_call()
        checked = validate.chat(request, self._core.rules(request.model, call.principal))
        return inference_pb2.ChatResponse(response=await self._whole(checked, call, context))

    async def StreamGenerate(self, request: inference_pb2.StreamGenerateRequest, context: Context) -> None:  # type: ignore[override]
        """See the proto."""
        call = current_call()
        rules = self._core.rules(request.request.model, call.principal)
        checked = validate.generation(request.request, rules, request.stream)
        await self._streamed(checked, call, context, inference_pb2.StreamGenerateResponse)

    async def StreamChat(self, request: inference_pb2.StreamChatRequest, context: Context) -> None:  # type: ignore[override]
        """See the proto."""
        call = current_call()
        rules = self._core.rules(request.request.model, call.principal)
        checked = validate.chat(request.request, rules, request.stream)
        await self._streamed(checked, call, context, inference_pb2.StreamChatResponse)

    async def Score(self, request: inference_pb2.ScoreRequest, context: Context) -> inference_pb2.ScoreResponse:
        """See the proto."""
        call = current_call()
        checked = validate.score(request, self._core.rules(request.model, call.principal))
        answer = await score(self._core, checked, call, context)
        call.outcome = "stop"
        return answer

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        """See the proto."""
        validate_other.cancel(request, self._core.limits)
        tenant = current_call().principal.tenant
        return inference_pb2.CancelResponse(
            outcomes={name: self._core.admission.cancel(tenant, name) for name in request.request_ids}
        )

    async def _whole(self, request: GenerationRequest, call: Call, context: Context) -> inference_pb2.GenerateResponse:
        """Run a request and answer when it is complete."""
        ends: list[tuple[int, Finish]] = []
        async with running(self._core, request, call, context, streamed=False) as samples:
            outputs = [Delta(0)] * len(samples.streams)
            while samples.num_running:
                index, piece = await samples.take()
                if isinstance(piece, Delta):
                    outputs[index] = piece
                else:
                    ends.append((index, piece))
        finish = joint_finish(ends)
        self._count(call, samples, ends, first_delta=time.monotonic())
        token_bytes = self._core.served("").tokenizer.token_bytes
        first_id = samples.first_prompt_id
        wants_prompt = request.output.prompt_logprobs is not None
        return inference_pb2.GenerateResponse(
            request_id=call.request_id,
            model=self._core.served("").id,
            samples=[
                convert.sample(index, outputs[index], end, request.output, token_bytes) for index, end in sorted(ends)
            ],
            prompt_logprobs=convert.prompt_logprobs(first_id, finish.prompt_logprobs, token_bytes)
            if wants_prompt
            else (),
            usage=finish.usage,
            timings=convert.timings(finish.phases, finish.usage.output_tokens) if request.output.timings else None,
            create_time=convert.timestamp(call.arrived_unix_ns),
            seed=request.sampling.seed,
        )

    async def _streamed(
        self,
        request: GenerationRequest,
        call: Call,
        context: Context,
        kind: type[StreamResponse],
    ) -> None:
        """Run a request and send its output as it is made: start, deltas, an end of each sample, end."""
        token_bytes = self._core.served("").tokenizer.token_bytes
        limit_s = self._core.config.frontend.slow_reader_timeout_s
        async with (
            running(self._core, request, call, context, streamed=True) as samples,
            Writer(context, limit_s) as writer,
        ):
            start = inference_pb2.StreamStart(
                request_id=call.request_id,
                model=self._core.served("").id,
                create_time=convert.timestamp(call.arrived_unix_ns),
                seed=request.sampling.seed,
            )
            await writer.write(kind(start=start))
            first_delta, last_delta = 0.0, [0.0] * len(samples.streams)
            ends: list[tuple[int, Finish]] = []
            while samples.num_running:
                index, piece = await samples.take()
                if isinstance(piece, Finish):
                    ends.append((index, piece))
                    if len(ends) == len(samples.streams):
                        self._count(call, samples, ends, first_delta=first_delta)
                    await writer.write(kind(sample_end=convert.sample_end(index, piece)))
                    continue
                message = kind()
                convert.fill_delta(message.delta, index, piece, request.output, token_bytes)
                now = await writer.write(message)
                if last_delta[index]:
                    self._core.metrics.output_gap.observe(now - last_delta[index])
                first_delta, last_delta[index] = first_delta or now, now
            finish = joint_finish(ends)
            end = inference_pb2.StreamEnd(usage=finish.usage)
            if request.output.timings:
                end.timings.CopyFrom(convert.timings(finish.phases, finish.usage.output_tokens))
            if request.output.prompt_logprobs is not None:
                first_id = samples.first_prompt_id
                end.prompt_logprobs.extend(convert.prompt_logprobs(first_id, finish.prompt_logprobs, token_bytes))
            await writer.write(kind(end=end))

    def _count(self, call: Call, samples: Samples, ends: list[tuple[int, Finish]], first_delta: float) -> None:
        """Fill the metrics of a request that ended normally."""
        finish = joint_finish(ends)
        metrics, phases, usage = self._core.metrics, finish.phases, finish.usage
        call.outcome = finish.outcome
        if samples.first_token is not None and first_delta:
            metrics.time_to_first_token.observe(first_delta - call.arrived)
        for _, end in ends:
            if (number := end.usage.output_tokens) > 1:
                metrics.time_per_output_token.observe(end.phases.decode / 1e9 / (number - 1))
        metrics.request_phases(phases.queue / 1e9, phases.prefill / 1e9, phases.decode / 1e9, phases.stalled / 1e9)
        metrics.request_prompt_tokens.observe(usage.prompt_tokens)
        metrics.request_output_tokens.observe(usage.output_tokens)
        log.debug("request %s: %s, %d tokens", call.request_id, finish.outcome, usage.output_tokens)
