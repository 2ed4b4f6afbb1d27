"""Bad input of every other call, of messages that are no messages, and of callers without a key."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from pawl.v1 import admin_pb2, inference_pb2, model_pb2, tokenizer_pb2, types_pb2
from tests.e2e.bad_input import Row, conversation, generate, ids, text, turn
from tests.fakes.tokenizer import VOCAB_SIZE

__all__ = ["OTHER_ROWS"]


def _chat(name: str, field: str, given: types_pb2.Conversation | None, limit: str = "", reason: str = "") -> Row:
    message = inference_pb2.ChatRequest(conversation=given)
    return Row(name, "InferenceService/Chat", message, (field,), limit=limit, reason=reason)


def _score(
    name: str, field: str, context: types_pb2.Prompt | None, *continuations: types_pb2.Prompt, limit: str = ""
) -> Row:
    message = inference_pb2.ScoreRequest(context=context, continuations=continuations)
    return Row(name, "InferenceService/Score", message, (field,), limit=limit)


def _tokenizer(name: str, method: str, message: Message, *fields: str, limit: str = "") -> Row:
    return Row(name, f"TokenizerService/{method}", message, fields, limit=limit)


_TURN = "conversation.messages[0]"
CHAT = [
    _chat("no-conversation", "conversation.messages", None),
    _chat("role-missing", f"{_TURN}.role", conversation(turn(role=0))),
    _chat("role-unknown", f"{_TURN}.role", conversation(turn(role=99))),
    _chat("name-too-long", f"{_TURN}.name", conversation(turn(name="x" * 65))),
    _chat("turns", "conversation.messages", conversation(*[turn()] * 8), "max_messages"),
    _chat("turns-bytes", "conversation.messages", conversation(turn("x" * 601)), "max_prompt_bytes"),
    _chat("turns-beyond-context", "conversation", conversation(turn("x" * 300))),
    _chat(
        "variables",
        "conversation.template_kwargs",
        conversation(template_kwargs={"a": "", "b": "", "c": ""}),
        "max_template_kwargs",
    ),
    _chat(
        "variable-reserved",
        "conversation.template_kwargs['messages']",
        conversation(template_kwargs={"messages": "x"}),
    ),
    _chat(
        "variable-not-a-name",
        "conversation.template_kwargs['{{ x }}']",
        conversation(template_kwargs={"{{ x }}": ""}),
    ),
    _chat(
        "two-ways-to-go-on",
        "conversation.add_generation_prompt",
        conversation(add_generation_prompt=True, continue_final_message=True),
    ),
    _chat("nothing-to-continue", f"{_TURN}.content", conversation(turn(" "), continue_final_message=True)),
    _chat(
        "refused-by-template",
        "conversation",
        conversation(turn(role=types_pb2.ROLE_TOOL)),
        reason="TEMPLATE_REFUSED",
    ),
    Row(
        "stream-chat-of-nothing",
        "InferenceService/StreamChat",
        inference_pb2.StreamChatRequest(),
        ("request.conversation.messages",),
    ),
]
OTHERS = [
    _score("score-without-context", "context", None, text("a")),
    _score("score-of-nothing", "continuations", text("a")),
    _score("score-of-an-empty-text", "continuations[1]", text("a"), text("a"), text("")),
    _score("score-of-no-kind", "continuations[0]", text("a"), types_pb2.Prompt()),
    _score(
        "score-with-specials",
        "continuations[0].add_special_tokens",
        text("a"),
        types_pb2.Prompt(text="a", add_special_tokens=True),
    ),
    _score("score-beyond-context", "continuations[0]", ids(*[5] * 150), ids(*[5] * 150)),
    _score("continuations", "continuations", text("a"), *[text("a")] * 4, limit="max_continuations"),
    Row("cancel-of-nothing", "InferenceService/Cancel", inference_pb2.CancelRequest(), ("request_ids",)),
    Row(
        "cancels",
        "InferenceService/Cancel",
        inference_pb2.CancelRequest(request_ids=["a"] * 10),
        ("request_ids",),
        limit="max_cancel_ids",
    ),
    Row(
        "cancel-reason-too-long",
        "InferenceService/Cancel",
        inference_pb2.CancelRequest(request_ids=["a"], reason="x" * 257),
        ("reason",),
    ),
    _tokenizer("tokenize-nothing", "Tokenize", tokenizer_pb2.TokenizeRequest(), "texts"),
    _tokenizer(
        "texts", "Tokenize", tokenizer_pb2.TokenizeRequest(texts=["a"] * 9), "texts", limit="max_tokenize_texts"
    ),
    _tokenizer(
        "texts-bytes",
        "Tokenize",
        tokenizer_pb2.TokenizeRequest(texts=["x" * 301, "x" * 300]),
        "texts",
        limit="max_prompt_bytes",
    ),
    _tokenizer("detokenize-nothing", "Detokenize", tokenizer_pb2.DetokenizeRequest(), "sequences"),
    _tokenizer(
        "detokenize-unknown-id",
        "Detokenize",
        tokenizer_pb2.DetokenizeRequest(sequences=[types_pb2.TokenIds(ids=[5, VOCAB_SIZE])]),
        "sequences[0].ids[1]",
    ),
    _tokenizer("render-nothing", "RenderChat", tokenizer_pb2.RenderChatRequest(), "conversation.messages"),
    Row("no-model-name", "ModelService/GetModel", model_pb2.GetModelRequest(), ("name",)),
    Row("page-negative", "ModelService/ListModels", model_pb2.ListModelsRequest(page_size=-1), ("page_size",)),
    Row("page-token-foreign", "ModelService/ListModels", model_pb2.ListModelsRequest(page_token="!"), ("page_token",)),
    Row("requests-page", "AdminService/ListRequests", admin_pb2.ListRequestsRequest(page_size=1001), ("page_size",)),
    Row(
        "watch-too-often",
        "AdminService/WatchLoad",
        admin_pb2.WatchLoadRequest(min_interval=Duration(nanos=1)),
        ("min_interval",),
    ),
    Row(
        "drain-into-the-past",
        "AdminService/Drain",
        admin_pb2.DrainRequest(grace_period=Duration(seconds=-1)),
        ("grace_period",),
    ),
]
_NOT_FOUND = grpc.StatusCode.NOT_FOUND
_UNKNOWN = grpc.StatusCode.UNIMPLEMENTED
_TOO_LARGE = grpc.StatusCode.RESOURCE_EXHAUSTED
_NO_KEY = grpc.StatusCode.UNAUTHENTICATED
_MALFORMED = "MALFORMED_MESSAGE"
_VALID = generate().SerializeToString()
_KEY = "pawl-api-key"


def _raw(name: str, data: bytes, method: str = "InferenceService/Generate") -> Row:
    return Row(name, method, data, reason=_MALFORMED)


def _key(name: str, reason: str, *metadata: tuple[str, str]) -> Row:
    return Row(name, "InferenceService/Generate", generate(), status=_NO_KEY, reason=reason, metadata=metadata)


OUTSIDE = [
    Row("model-unknown", "InferenceService/Generate", generate(model="other"), status=_NOT_FOUND),
    Row("model-long", "InferenceService/Generate", generate(model="x" * 60_000), status=_NOT_FOUND),
    Row(
        "model-unknown-of-a-stream",
        "InferenceService/StreamGenerate",
        inference_pb2.StreamGenerateRequest(request=generate(model="models/other")),
        status=_NOT_FOUND,
    ),
    Row(
        "model-unknown-of-tokens",
        "TokenizerService/Tokenize",
        tokenizer_pb2.TokenizeRequest(model="other"),
        status=_NOT_FOUND,
    ),
    Row(
        "model-unknown-by-name",
        "ModelService/GetModel",
        model_pb2.GetModelRequest(name="models/" + "x"),
        status=_NOT_FOUND,
    ),
    _raw("garbage", bytes(range(255, 128, -1))),
    _raw("truncated", _VALID[:-1]),
    _raw("text-not-utf-8", b"\x12\x04\x0a\x02\xff\xfe"),
    _raw("length-beyond-the-end", b"\x12\xff\xff\xff\xff\x07"),
    _raw("endless-number", b"\x08" + b"\xff" * 11),
    _raw("text-not-utf-8-in-a-stream", b"\x0a\x06\x12\x04\x0a\x02\xff\xfe", "InferenceService/StreamGenerate"),
    _raw("garbage-to-cancel", b"\xff\xff\xff", "InferenceService/Cancel"),
    _raw("garbage-to-tokenize", b"\xff\xff\xff", "TokenizerService/Tokenize"),
    _raw("garbage-to-admin", b"\xff\xff\xff", "AdminService/ListRequests"),
    Row("no-such-method", "InferenceService/Embed", b"", status=_UNKNOWN, by_grpc=True),
    Row("no-such-service", "Nothing/Generate", b"", status=_UNKNOWN, by_grpc=True),
    Row(
        "message-bytes",
        "InferenceService/Generate",
        generate(prompt=text("x" * 65_536)),
        status=_TOO_LARGE,
        limit="max_request_bytes",
        by_grpc=True,
    ),
    Row(
        "metadata-bytes",
        "InferenceService/Generate",
        generate(),
        status=_TOO_LARGE,
        limit="max_metadata_bytes",
        metadata=(("x-much", "y" * 8_192),),
        by_grpc=True,
    ),
    _key("key-missing", "API_KEY_MISSING", ("x-none", "")),
    _key("key-empty", "API_KEY_MISSING", (_KEY, "")),
    _key("key-unknown", "API_KEY_INVALID", (_KEY, "pawl-wrong")),
    _key("key-too-long", "API_KEY_INVALID", (_KEY, "x" * 4_000)),
    _key("key-of-another-scheme", "API_KEY_MISSING", ("authorization", "Basic dXNlcjpwYXNz")),
]
OTHER_ROWS: list[Row] = [*CHAT, *OTHERS, *OUTSIDE]
