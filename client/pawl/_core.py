"""The calls as plain values: what a client method sends, and how it reads the answer.

Owns everything that the sync and the async client would otherwise say twice; each of their methods hands a
`Call` from here to its transport. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf import message

from pawl import _build, _convert, _methods
from pawl._convert import StreamMessage
from pawl._inputs import Message, Prompt
from pawl._methods import Method
from pawl._options import (
    CallOptions,
    ChatOptions,
    GenerateOptions,
    ScoreOptions,
    Settings,
    StreamChatOptions,
    StreamOptions,
)
from pawl._retry import Retry
from pawl._types import CancelOutcome, Completion, Model, RenderedChat, Scores, Tokenization
from pawl.v1 import inference_pb2, model_pb2, tokenizer_pb2, types_pb2

__all__ = [
    "Call",
    "cancel",
    "chat",
    "detokenize",
    "generate",
    "get_model",
    "list_models",
    "make_call",
    "render_chat",
    "score",
    "stream_chat",
    "stream_generate",
    "tokenize",
]

ResponseT = TypeVar("ResponseT", bound=message.Message)
ResultT_co = TypeVar("ResultT_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Call(Generic[ResponseT, ResultT_co]):
    """One call, not made yet.

    Attributes:
        method: which.
        request: what is sent.
        convert: what the caller gets for a response.
        timeout: seconds for everything, retries included; infinite for none.
        retry: how it is tried again.
    """

    method: Method[ResponseT]
    request: message.Message
    convert: Callable[[ResponseT], ResultT_co]
    timeout: float
    retry: Retry


def make_call(
    settings: Settings,
    method: Method[ResponseT],
    request: message.Message,
    convert: Callable[[ResponseT], ResultT_co],
    timeout: float | None = None,
) -> Call[ResponseT, ResultT_co]:
    """A call with the client's retries, and its timeout unless one is given.

    Raises:
        InvalidRequest: a timeout that is not above 0.
    """
    if timeout is not None and not timeout > 0:
        raise _build.invalid("timeout", f"is {timeout}; give seconds above 0, or math.inf for none")
    return Call(method, request, convert, settings.timeout if timeout is None else timeout, settings.retry)


def _as_it_is(response: StreamMessage) -> StreamMessage:
    return response


def generate(
    settings: Settings, prompt: Prompt, options: GenerateOptions
) -> Call[inference_pb2.GenerateResponse, Completion]:
    """Continue a prompt."""
    request = _build.generate_request(settings, prompt, options)
    return make_call(settings, _methods.GENERATE, request, _convert.completion, options.get("timeout"))


def stream_generate(
    settings: Settings, prompt: Prompt, options: StreamOptions
) -> Call[inference_pb2.StreamGenerateResponse, StreamMessage]:
    """Continue a prompt, streamed."""
    request = inference_pb2.StreamGenerateRequest(
        request=_build.generate_request(settings, prompt, options), stream=_build.stream_options(options)
    )
    return make_call(settings, _methods.STREAM_GENERATE, request, _as_it_is, options.get("timeout"))


def chat(
    settings: Settings, messages: Sequence[Message], options: ChatOptions
) -> Call[inference_pb2.ChatResponse, Completion]:
    """Continue a conversation."""

    def convert(answer: inference_pb2.ChatResponse) -> Completion:
        return _convert.completion(answer.response)

    request = _build.chat_request(settings, messages, options)
    return make_call(settings, _methods.CHAT, request, convert, options.get("timeout"))


def stream_chat(
    settings: Settings, messages: Sequence[Message], options: StreamChatOptions
) -> Call[inference_pb2.StreamChatResponse, StreamMessage]:
    """Continue a conversation, streamed."""
    request = inference_pb2.StreamChatRequest(
        request=_build.chat_request(settings, messages, options), stream=_build.stream_options(options)
    )
    return make_call(settings, _methods.STREAM_CHAT, request, _as_it_is, options.get("timeout"))


def score(
    settings: Settings,
    context: Prompt,
    continuations: Sequence[Prompt],
    alternatives: int | None,
    options: ScoreOptions,
) -> Call[inference_pb2.ScoreResponse, Scores]:
    """Log-probabilities of continuations."""
    if isinstance(continuations, str):
        raise _build.invalid("continuations", "is one str; give a sequence, such as [' blue', ' green']")
    values: dict[str, object] = {
        "model": _build.model_name(settings, options),
        "context": _build.prompt_message(context, "context"),
        "continuations": [
            _build.prompt_message(continuation, f"continuations[{place}]")
            for place, continuation in enumerate(continuations)
        ],
        "alternatives": alternatives,
        "options": _build.request_options(settings, options),
    }
    request = _build.build(inference_pb2.ScoreRequest, "alternatives", values)
    return make_call(settings, _methods.SCORE, request, _convert.scores, options.get("timeout"))


def cancel(
    settings: Settings, request_ids: Sequence[str], reason: str, timeout: float | None
) -> Call[inference_pb2.CancelResponse, dict[str, CancelOutcome]]:
    """End running requests."""
    values = {"request_ids": request_ids, "reason": reason}
    request = _build.build(inference_pb2.CancelRequest, "request_ids", values)
    return make_call(settings, _methods.CANCEL, request, _convert.cancel_outcomes, timeout)


def tokenize(
    settings: Settings, text: str, *, add_special_tokens: bool | None, offsets: bool, options: CallOptions
) -> Call[tokenizer_pb2.TokenizeResponse, Tokenization]:
    """Text to token ids."""
    if not isinstance(text, str):
        raise _build.invalid("text", f"is a {type(text).__name__}; give one str")
    values: dict[str, object] = {
        "model": _build.model_name(settings, options),
        "texts": [text],
        "add_special_tokens": add_special_tokens,
        "offsets": offsets,
    }
    request = _build.build(tokenizer_pb2.TokenizeRequest, "text", values)
    return make_call(settings, _methods.TOKENIZE, request, _convert.tokenization, options.get("timeout"))


def detokenize(
    settings: Settings, token_ids: Sequence[int], *, skip_special_tokens: bool | None, options: CallOptions
) -> Call[tokenizer_pb2.DetokenizeResponse, str]:
    """Token ids to text."""

    def convert(answer: tokenizer_pb2.DetokenizeResponse) -> str:
        return answer.texts[0] if answer.texts else ""

    values: dict[str, object] = {
        "model": _build.model_name(settings, options),
        "sequences": [_build.build(types_pb2.TokenIds, "token_ids", {"ids": token_ids})],
        "skip_special_tokens": skip_special_tokens,
    }
    request = _build.build(tokenizer_pb2.DetokenizeRequest, "skip_special_tokens", values)
    return make_call(settings, _methods.DETOKENIZE, request, convert, options.get("timeout"))


def render_chat(
    settings: Settings, messages: Sequence[Message], options: ChatOptions
) -> Call[tokenizer_pb2.RenderChatResponse, RenderedChat]:
    """The prompt that a chat call would run."""
    values = {"model": _build.model_name(settings, options), "conversation": _build.conversation(messages, options)}
    request = _build.build(tokenizer_pb2.RenderChatRequest, "model", values)
    return make_call(settings, _methods.RENDER_CHAT, request, _convert.rendered_chat, options.get("timeout"))


def get_model(settings: Settings, name: str) -> Call[model_pb2.GetModelResponse, Model]:
    """One model."""

    def convert(answer: model_pb2.GetModelResponse) -> Model:
        return _convert.model(answer.model)

    request = _build.build(model_pb2.GetModelRequest, "name", {"name": name})
    return make_call(settings, _methods.GET_MODEL, request, convert)


def list_models(settings: Settings, page_token: str) -> Call[model_pb2.ListModelsResponse, tuple[list[Model], str]]:
    """A page of models, and the token of the next one."""

    def convert(answer: model_pb2.ListModelsResponse) -> tuple[list[Model], str]:
        return [_convert.model(model) for model in answer.models], answer.next_page_token

    request = model_pb2.ListModelsRequest(page_token=page_token)
    return make_call(settings, _methods.LIST_MODELS, request, convert)
