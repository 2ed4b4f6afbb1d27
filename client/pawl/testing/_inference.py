"""The fake's InferenceService: the contract's own messages around the fake model.

Owns the order of events in a stream and where a planned fault strikes.
"""
# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf import timestamp_pb2

from pawl.errors import PawlError
from pawl.testing._job import Job, Request, check_model, prompt_ids
from pawl.testing._model import decode, encode, logprobs
from pawl.testing._state import Fault, LiveRequest, State, abort
from pawl.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["FakeInference"]

_ARRIVAL = timestamp_pb2.Timestamp(seconds=1_700_000_000)
_DEFAULT_SEED = 42


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Generates, chats, scores and cancels."""

    def __init__(self, state: State) -> None:
        self._state = state

    def _events(
        self, request: Request, fault: Fault | None, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.StreamGenerateResponse]:
        job = Job.of(request, self._state.model)
        options = request.options
        with self._state.admit(
            options.request_id, len(job.prompt_ids), options.priority, options.user, context
        ) as live:
            start = inference_pb2.StreamStart(
                request_id=live.request_id,
                model=f"models/{self._state.model.name}",
                create_time=_ARRIVAL,
                seed=request.sampling.seed if request.sampling.HasField("seed") else _DEFAULT_SEED,
            )
            yield inference_pb2.StreamGenerateResponse(start=start)
            sent, pieces = [0] * len(job.outputs), list(job.pieces(self._state.chunk_tokens))
            for place, (index, first, last) in enumerate(pieces):
                if self._strike(fault, place, live):
                    return
                if live.cancelled:
                    break
                yield inference_pb2.StreamGenerateResponse(delta=job.delta(index, first, last))
                sent[index] = last
                live.output_tokens = sum(sent)
            else:
                if self._strike(fault, len(pieces), live):
                    return
            sample_ends, end = job.endings(sent, cancelled=live.cancelled)
            for sample_end in sample_ends:
                yield inference_pb2.StreamGenerateResponse(sample_end=sample_end)
            yield inference_pb2.StreamGenerateResponse(end=end)

    def _strike(self, fault: Fault | None, num_deltas: int, live: LiveRequest) -> bool:
        """Let a planned fault happen once so many deltas were sent; true if nothing may follow."""
        if fault is None or (fault.after or 0) != num_deltas:
            return False
        if fault.error is not None:
            raise fault.error
        if fault.kind == "truncate":
            return True
        self._state.stand_still(live)
        return live.gone

    def _whole(self, method: str, request: Request, context: grpc.ServicerContext) -> inference_pb2.GenerateResponse:
        answer = inference_pb2.GenerateResponse()
        samples = [answer.samples.add(index=index) for index in range(max(1, request.sampling.sample_count))]
        fault = self._state.receive(method, request, context)
        for event in self._events(request, fault, context):
            match event.WhichOneof("event"):
                case "start":
                    start = event.start
                    answer.request_id, answer.model, answer.seed = start.request_id, start.model, start.seed
                    answer.create_time.CopyFrom(start.create_time)
                case "delta":
                    sample = samples[event.delta.index]
                    sample.text += event.delta.text
                    sample.token_ids.extend(event.delta.token_ids)
                    sample.logprobs.extend(event.delta.logprobs)
                case "sample_end":
                    sample = samples[event.sample_end.index]
                    sample.finish_reason = event.sample_end.finish_reason
                    if event.sample_end.HasField("stop_match"):
                        sample.stop_match.CopyFrom(event.sample_end.stop_match)
                case "end":
                    answer.usage.CopyFrom(event.end.usage)
                    if event.end.HasField("timings"):
                        answer.timings.CopyFrom(event.end.timings)
                    answer.prompt_logprobs.extend(event.end.prompt_logprobs)
        return answer

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        try:
            return self._whole("Generate", request, context)
        except PawlError as error:
            abort(context, error)

    def Chat(self, request: inference_pb2.ChatRequest, context: grpc.ServicerContext) -> inference_pb2.ChatResponse:
        try:
            return inference_pb2.ChatResponse(response=self._whole("Chat", request, context))
        except PawlError as error:
            abort(context, error)

    def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.StreamGenerateResponse]:
        try:
            fault = self._state.receive("StreamGenerate", request, context)
            yield from self._events(request.request, fault, context)
        except PawlError as error:
            abort(context, error)

    def StreamChat(
        self, request: inference_pb2.StreamChatRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.StreamChatResponse]:
        try:
            fault = self._state.receive("StreamChat", request, context)
            for event in self._events(request.request, fault, context):
                # The two messages have the same fields under the same numbers.
                yield inference_pb2.StreamChatResponse.FromString(event.SerializeToString())
        except PawlError as error:
            abort(context, error)

    def Score(self, request: inference_pb2.ScoreRequest, context: grpc.ServicerContext) -> inference_pb2.ScoreResponse:
        try:
            self._state.receive("Score", request, context)
            check_model(self._state.model, request.model)
            return self._score(request)
        except PawlError as error:
            abort(context, error)

    def _score(self, request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        context_ids = prompt_ids(request.context)
        reply = self._state.model.reply(decode(context_ids))
        answer = inference_pb2.ScoreResponse(request_id=request.options.request_id or "fake-score")
        answer.usage.prompt_tokens = len(context_ids)
        for prompt in request.continuations:
            ids = list(prompt.token_ids.ids) or encode(prompt.text, special=False)
            tokens = logprobs(ids, request.alternatives)
            answer.usage.prompt_tokens += len(ids)
            answer.continuations.add(
                tokens=tokens,
                total_logprob=sum(token.logprob for token in tokens),
                greedy_match=reply.startswith(decode(ids)),
                byte_count=len(decode(ids).encode()),
            )
        return answer

    def Cancel(
        self, request: inference_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> inference_pb2.CancelResponse:
        try:
            self._state.receive("Cancel", request, context)
        except PawlError as error:
            abort(context, error)
        answer = inference_pb2.CancelResponse()
        with self._state.changed:
            for request_id in request.request_ids:
                live = self._state.live.get(request_id)
                if live is not None:
                    live.cancelled = True
                    outcome = inference_pb2.CANCEL_OUTCOME_CANCELLED
                elif request_id in self._state.ended:
                    outcome = inference_pb2.CANCEL_OUTCOME_ALREADY_FINISHED
                else:
                    outcome = inference_pb2.CANCEL_OUTCOME_NOT_FOUND
                answer.outcomes[request_id] = outcome
            self._state.changed.notify_all()
        return answer
