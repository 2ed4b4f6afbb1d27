"""The fake's other services: tokenizer, models, admin and health.

Owns their answers; the fake model and the shared state decide what they are.
"""
# ruff: noqa: N802 (gRPC names the methods)

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf import message, wrappers_pb2

from pawl import _convert
from pawl._version import __version__
from pawl.errors import PawlError
from pawl.testing._job import check_model
from pawl.testing._model import BOS, EOS, VOCAB_SIZE, decode, encode, render
from pawl.testing._state import State, abort
from pawl.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

__all__ = ["FakeAdmin", "FakeModels", "FakeTokenizer", "health_handler"]

_NUM_BLOCKS = 256
_BLOCK_SIZE = 16


class _Fake:
    def __init__(self, state: State) -> None:
        self._state = state

    def _receive(self, method: str, request: message.Message, context: grpc.ServicerContext, model: str = "") -> None:
        try:
            self._state.receive(method, request, context)
            check_model(self._state.model, model)
        except PawlError as error:
            abort(context, error)


class FakeTokenizer(_Fake, tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One token per character."""

    def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> tokenizer_pb2.TokenizeResponse:
        self._receive("Tokenize", request, context, request.model)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        answer = tokenizer_pb2.TokenizeResponse(max_context_tokens=self._state.model.max_context_tokens)
        for text in request.texts:
            ids = encode(text, special=special)
            result = answer.results.add(token_ids=ids, token_count=len(ids))
            place = 0
            for token_id in ids if request.offsets else ():
                covered = b"" if token_id in (BOS, EOS) else chr(token_id).encode()
                result.tokens.add(
                    id=token_id,
                    bytes=covered,
                    start_byte=place,
                    end_byte=place + len(covered),
                    special=token_id in (BOS, EOS),
                )
                place += len(covered)
        return answer

    def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> tokenizer_pb2.DetokenizeResponse:
        self._receive("Detokenize", request, context, request.model)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        return tokenizer_pb2.DetokenizeResponse(
            texts=[decode(sequence.ids, skip_special=skip) for sequence in request.sequences]
        )

    def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: grpc.ServicerContext
    ) -> tokenizer_pb2.RenderChatResponse:
        self._receive("RenderChat", request, context, request.model)
        text = render(request.conversation)
        return tokenizer_pb2.RenderChatResponse(text=text, token_ids=encode(text, special=False))


class FakeModels(_Fake, model_pb2_grpc.ModelServiceServicer):
    """One model."""

    def _model(self) -> model_pb2.Model:
        answer = model_pb2.Model(
            name=f"models/{self._state.model.name}",
            display_name=self._state.model.name,
            architectures=["FakeForCausalLM"],
            max_context_tokens=self._state.model.max_context_tokens,
            vocab_size=VOCAB_SIZE,
            data_type="float32",
            eos_token_ids=[EOS],
            has_chat_template=True,
            revision="fake",
        )
        answer.default_sampling.temperature = 1.0
        return answer

    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        self._receive("GetModel", request, context, request.name)
        return model_pb2.GetModelResponse(model=self._model())

    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        self._receive("ListModels", request, context)
        return model_pb2.ListModelsResponse(models=[self._model()])


class FakeAdmin(_Fake, admin_pb2_grpc.AdminServiceServicer):
    """Operates the fake."""

    def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetServerInfoResponse:
        self._receive("GetServerInfo", request, context)
        return admin_pb2.GetServerInfoResponse(
            version=__version__,
            instance_id="fake",
            block_size=_BLOCK_SIZE,
            block_count=_NUM_BLOCKS,
            replica_count=1,
            config={"model": self._state.model.name},
        )

    def _load(self) -> admin_pb2.WatchLoadResponse:
        answer = admin_pb2.WatchLoadResponse()
        answer.load.running_requests = len(self._state.live)
        answer.load.block_count = _NUM_BLOCKS
        answer.load.free_blocks = max(0, _NUM_BLOCKS - self._state.cached_blocks)
        answer.load.evictable_blocks = min(_NUM_BLOCKS, self._state.cached_blocks)
        answer.load.workers.add(rank=0, state=admin_pb2.WORKER_STATE_READY)
        return answer

    def WatchLoad(
        self, request: admin_pb2.WatchLoadRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchLoadResponse]:
        self._receive("WatchLoad", request, context)
        context.add_callback(self._wake)
        sent: admin_pb2.WatchLoadResponse | None = None
        while context.is_active():
            with self._state.changed:
                while context.is_active() and self._load() == sent:
                    self._state.changed.wait()
                sent = self._load()
            yield sent

    def _wake(self) -> None:
        with self._state.changed:
            self._state.changed.notify_all()

    def ListRequests(
        self, request: admin_pb2.ListRequestsRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ListRequestsResponse:
        self._receive("ListRequests", request, context)
        first = int(request.page_token or 0)
        size = min(request.page_size or 100, self._state.max_page_size)
        with self._state.changed:
            live = list(self._state.live.values())
        answer = admin_pb2.ListRequestsResponse(next_page_token=str(first + size) if first + size < len(live) else "")
        for state in live[first : first + size]:
            answer.requests.add(
                request_id=state.request_id,
                phase="decode",
                prompt_tokens=state.prompt_tokens,
                output_tokens=state.output_tokens,
                block_count=-(-state.prompt_tokens // _BLOCK_SIZE),
                priority=state.priority,
                user=state.user,
            )
        return answer

    def Drain(self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext) -> admin_pb2.DrainResponse:
        self._receive("Drain", request, context)
        grace = _convert.seconds(request.grace_period) if request.HasField("grace_period") else 30.0
        with self._state.changed:
            self._state.draining = True
            self._state.changed.wait_for(lambda: not self._state.live, timeout=grace)
            left = list(self._state.live.values())
            for state in left:
                state.cancelled = True
            self._state.changed.notify_all()
            self._state.changed.wait_for(lambda: not self._state.live)
        return admin_pb2.DrainResponse(cancelled_request_count=len(left))

    def FlushPrefixCache(
        self, request: admin_pb2.FlushPrefixCacheRequest, context: grpc.ServicerContext
    ) -> admin_pb2.FlushPrefixCacheResponse:
        self._receive("FlushPrefixCache", request, context)
        with self._state.changed:
            freed, self._state.cached_blocks = self._state.cached_blocks, 0
        return admin_pb2.FlushPrefixCacheResponse(freed_block_count=freed)


def health_handler(state: State) -> grpc.GenericRpcHandler:
    """`grpc.health.v1.Health/Check`, with the wire-compatible well-known types that the SDK uses."""

    def check(request: wrappers_pb2.StringValue, context: grpc.ServicerContext) -> wrappers_pb2.Int32Value:
        serving, not_serving = 1, 2
        return wrappers_pb2.Int32Value(value=serving if state.ready and not state.draining else not_serving)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=wrappers_pb2.StringValue.FromString,
        response_serializer=wrappers_pb2.Int32Value.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
