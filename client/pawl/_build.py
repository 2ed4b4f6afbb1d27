"""What goes out: the SDK's keywords and types as messages of the wire.

Owns every to-proto conversion of calls about models; `_convert` does the way back. Checks types, never
ranges: limits are the server's, and its answer names every field that is wrong at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from google.protobuf import duration_pb2, message

from pawl._inputs import Message, Prompt, Role, Sampling, Stop
from pawl._options import (
    CallOptions,
    ChatOptions,
    GenerateOptions,
    OutputOptions,
    ScoreOptions,
    Settings,
    StreamChatOptions,
    StreamOptions,
)
from pawl.errors import FieldViolation, InvalidRequest
from pawl.v1 import inference_pb2, types_pb2

__all__ = [
    "build",
    "chat_request",
    "conversation",
    "duration",
    "generate_request",
    "invalid",
    "model_name",
    "prompt_message",
    "request_options",
    "stream_options",
]

MessageT = TypeVar("MessageT", bound=message.Message)

_ROLES = {
    Role.SYSTEM: types_pb2.ROLE_SYSTEM,
    Role.USER: types_pb2.ROLE_USER,
    Role.ASSISTANT: types_pb2.ROLE_ASSISTANT,
    Role.TOOL: types_pb2.ROLE_TOOL,
}
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choices")
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "sample_count",
)


def invalid(field: str, what: str) -> InvalidRequest:
    """The error for one wrong field: its path, and what is wrong with the remedy."""
    return InvalidRequest(f"{field} {what}", violations=[FieldViolation(field, what)])


def duration(value: float, field: str) -> duration_pb2.Duration:
    """Seconds as a duration.

    Raises:
        InvalidRequest: not a finite number of seconds, 0 or more.
    """
    if not 0 <= value < 3.2e11:
        raise invalid(field, f"is {value}; give seconds, 0 or more")
    answer = duration_pb2.Duration()
    answer.FromNanoseconds(round(value * 1e9))
    return answer


def model_name(settings: Settings, options: CallOptions) -> str:
    """Name of the model: the call's, else the client's; empty for the only one served."""
    return options.get("model") or settings.default_model


def prompt_message(prompt: Prompt, field: str, *, add_special_tokens: bool | None = None) -> types_pb2.Prompt:
    """Text or token ids; `field` names it in errors."""
    if isinstance(prompt, str):
        return build(types_pb2.Prompt, field, {"text": prompt, "add_special_tokens": add_special_tokens})
    if isinstance(prompt, bytes | bytearray):
        raise invalid(field, "is bytes; give str, or a sequence of token ids")
    try:
        token_ids = types_pb2.TokenIds(ids=prompt)
    except (TypeError, ValueError) as error:
        raise invalid(field, f"is neither str nor a sequence of token ids: {error}") from error
    return build(types_pb2.Prompt, field, {"token_ids": token_ids, "add_special_tokens": add_special_tokens})


def _sampling(options: OutputOptions) -> types_pb2.SamplingParams | None:
    base = options.get("sampling")
    values: dict[str, object] = {}
    for name in _SAMPLING_FIELDS:
        value = cast("Mapping[str, object]", options).get(name)
        if value is None and isinstance(base, Sampling):
            value = getattr(base, name)
        if value is not None:
            values[name] = value
    values |= _constraint(options, base)
    if not values:
        return None
    return build(types_pb2.SamplingParams, "sampling", values)


def _constraint(options: OutputOptions, base: Sampling | None) -> dict[str, object]:
    """What the output must be: of the call's keywords, else of its `sampling`."""
    for source in (cast("Mapping[str, object]", options), {} if base is None else _constraints_of(base)):
        given = {name: source[name] for name in _CONSTRAINTS if source.get(name) is not None}
        if len(given) > 1:
            raise invalid(f"sampling.{list(given)[1]}", f"is given beside {next(iter(given))}; give one of them")
        for name, value in given.items():
            return {name: _constraint_value(name, value)}
    return {}


def _constraints_of(base: Sampling) -> Mapping[str, object]:
    return {name: getattr(base, name) for name in _CONSTRAINTS}


def _constraint_value(name: str, value: object) -> object:
    if name == "choices":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise invalid("sampling.choices", f"is a {type(value).__name__}; give a sequence of str")
        return build(types_pb2.Choices, "sampling.choices", {"values": value})
    if name == "json_schema" and not isinstance(value, str):
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise invalid("sampling.json_schema", f"cannot be written as JSON: {error}") from error
    return value


def build(kind: type[MessageT], field: str, values: Mapping[str, object]) -> MessageT:
    """A message from keywords, with protobuf's own type errors turned into ours."""
    try:
        return kind(**values)
    except UnicodeEncodeError as error:
        raise invalid(field, f"has a lone surrogate, which is no text in UTF-8: {error.reason}") from error
    except (TypeError, ValueError) as error:
        raise invalid(field, f"has a value of a wrong type or size: {error}") from error


def _stop(options: OutputOptions) -> types_pb2.StopParams | None:
    given = options.get("stop")
    max_tokens = options.get("max_tokens")
    if given is None and max_tokens is None:
        return None
    if isinstance(given, Stop):
        stop = given
    else:
        stop = Stop(strings=(given,) if isinstance(given, str) else tuple(given or ()))
    if isinstance(stop.strings, str):
        raise invalid("stop.strings", "is one str; give a sequence of them")
    values: dict[str, object] = {
        "max_output_tokens": max_tokens if max_tokens is not None else stop.max_tokens,
        "min_output_tokens": stop.min_tokens,
        "stop_strings": stop.strings,
        "stop_token_ids": stop.token_ids,
        "include_stop": stop.include,
        "ignore_eos": stop.ignore_eos,
    }
    if stop.max_duration is not None:
        values["max_duration"] = duration(stop.max_duration, "stop.max_duration")
    return build(types_pb2.StopParams, "stop", values)


def _output(options: OutputOptions) -> types_pb2.OutputOptions:
    values: dict[str, object] = {
        "logprobs": options.get("logprobs"),
        "prompt_logprobs": options.get("prompt_logprobs"),
        "token_ids": options.get("token_ids", False),
        "omit_text": options.get("omit_text", False),
        "skip_special_tokens": options.get("skip_special_tokens"),
        "timings": options.get("timings", True),
    }
    return build(types_pb2.OutputOptions, "output", values)


def request_options(settings: Settings, options: ScoreOptions) -> types_pb2.RequestOptions:
    """How the request is handled."""
    priority = options.get("priority")
    values: dict[str, object] = {
        "request_id": options.get("request_id") or "",
        "priority": priority if priority is not None else settings.priority or 0,
        "bypass_prefix_cache": options.get("bypass_prefix_cache", False),
        "cache_salt": options.get("cache_salt") or "",
        "user": options.get("user") or "",
    }
    if (seconds := options.get("retain_prefix")) is not None:
        values["retain_prefix"] = duration(seconds, "options.retain_prefix")
    return build(types_pb2.RequestOptions, "options", values)


def generate_request(settings: Settings, prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """A request for a completion."""
    values: dict[str, object] = {
        "model": model_name(settings, options),
        "prompt": prompt_message(prompt, "prompt", add_special_tokens=options.get("add_special_tokens")),
        "sampling": _sampling(options),
        "stop": _stop(options),
        "output": _output(options),
        "options": request_options(settings, options),
    }
    return build(inference_pb2.GenerateRequest, "model", values)


def conversation(messages: Sequence[object], options: ChatOptions) -> types_pb2.Conversation:
    """A conversation and how to render it."""
    turns = []
    for place, turn in enumerate(messages):
        if not isinstance(turn, Message):
            field = f"conversation.messages[{place}]"
            raise invalid(field, f"is a {type(turn).__name__}; use pawl.user(...), system(...), assistant(...)")
        if not isinstance(turn.content, str):
            raise invalid(f"conversation.messages[{place}].content", f"is a {type(turn.content).__name__}; give str")
        parts = {"role": _ROLES[turn.role], "content": turn.content, "name": turn.name}
        turns.append(build(types_pb2.Message, f"conversation.messages[{place}]", parts))
    values: dict[str, object] = {
        "messages": turns,
        "continue_final_message": options.get("continue_final_message", False),
        "template_kwargs": dict(options.get("template_kwargs") or {}),
    }
    return build(types_pb2.Conversation, "conversation", values)


def chat_request(settings: Settings, messages: Sequence[Message], options: ChatOptions) -> inference_pb2.ChatRequest:
    """A request for the next turn."""
    values: dict[str, object] = {
        "model": model_name(settings, options),
        "conversation": conversation(messages, options),
        "sampling": _sampling(options),
        "stop": _stop(options),
        "output": _output(options),
        "options": request_options(settings, options),
    }
    return build(inference_pb2.ChatRequest, "model", values)


def stream_options(options: StreamOptions | StreamChatOptions) -> inference_pb2.StreamOptions:
    """How a stream is cut into messages."""
    values: dict[str, object] = {"min_chunk_tokens": options.get("min_chunk_tokens")}
    interval = options.get("min_chunk_interval")
    if interval is not None:
        values["min_chunk_interval"] = duration(interval, "stream.min_chunk_interval")
    return build(inference_pb2.StreamOptions, "stream", values)
