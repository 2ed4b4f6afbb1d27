"""Tokenize, Detokenize and RenderChat: answered here, whatever the replicas do.

Each call is a request of its tenant's requests per minute, as of any other gateway; it takes no place in the queue,
and its tokens are not those that the tenant pays for.
"""

# ruff: noqa: N802 - gRPC names the methods
from __future__ import annotations

from functools import partial

from pawl.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from pawl_server.frontend import validate_other
from pawl_server.frontend.calls import Context, current_call
from pawl_server.frontend.core import Core
from pawl_server.frontend.tokens import PlacedToken

__all__ = ["TokenizerService"]


class TokenizerService(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """The calls that need only the tokenizer."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: Context
    ) -> tokenizer_pb2.TokenizeResponse:
        """See the proto."""
        self._core.admission.count(current_call().principal)
        tokenizer = self._core.served(request.model).tokenizer
        validate_other.tokenize(request, self._core.limits)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        results: list[tokenizer_pb2.Tokenization] = []
        for text in request.texts:
            if request.offsets:
                encode = partial(tokenizer.encode_placed, text, add_special_tokens=special)
                results.append(_placed(await self._core.on_thread(encode)))
            else:
                ids = await self._core.encode_text(text, add_special_tokens=special)
                results.append(tokenizer_pb2.Tokenization(token_ids=ids, token_count=len(ids)))
        return tokenizer_pb2.TokenizeResponse(results=results, max_context_tokens=self._core.max_context)

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Context
    ) -> tokenizer_pb2.DetokenizeResponse:
        """See the proto."""
        self._core.admission.count(current_call().principal)
        tokenizer = self._core.served(request.model).tokenizer
        validate_other.detokenize(request, self._core.limits, self._core.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        sequences = [list(sequence.ids) for sequence in request.sequences]
        texts = await self._core.on_thread(
            lambda: [tokenizer.decode(ids, skip_special_tokens=skip) for ids in sequences]
        )
        return tokenizer_pb2.DetokenizeResponse(texts=texts)

    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Context
    ) -> tokenizer_pb2.RenderChatResponse:
        """See the proto."""
        self._core.admission.count(current_call().principal)
        self._core.served(request.model)
        conversation = validate_other.render(request, self._core.limits)
        text = await self._core.render(conversation, "conversation")
        ids = await self._core.encode_text(text, add_special_tokens=False)
        return tokenizer_pb2.RenderChatResponse(text=text, token_ids=ids)


def _placed(tokens: list[PlacedToken]) -> tokenizer_pb2.Tokenization:
    return tokenizer_pb2.Tokenization(
        token_ids=[token.token_id for token in tokens],
        tokens=[
            tokenizer_pb2.Token(
                id=token.token_id,
                bytes=token.token_bytes,
                start_byte=token.start,
                end_byte=token.end,
                special=token.special,
            )
            for token in tokens
        ],
        token_count=len(tokens),
    )
