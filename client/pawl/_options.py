"""The keywords that the calls share, each named once, and the settings of a client.

Owns names, types and defaults of what a caller may pass. Does not build requests (`_core` does).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypedDict

from pawl._inputs import Sampling, Stop
from pawl._retry import Retry
from pawl._secrets import secret
from pawl.errors import FieldViolation, InvalidRequest

__all__ = [
    "DEFAULT_ADMIN_TARGET",
    "DEFAULT_TARGET",
    "DEFAULT_TIMEOUT_S",
    "TLS",
    "CallOptions",
    "ChatOptions",
    "GenerateOptions",
    "OutputOptions",
    "ScoreOptions",
    "Settings",
    "StreamChatOptions",
    "StreamOptions",
    "refuse_unknown",
    "settings_from",
    "with_changes",
]

DEFAULT_TARGET: Final = "localhost:50051"
DEFAULT_ADMIN_TARGET: Final = "localhost:50052"
DEFAULT_TIMEOUT_S: Final = 600.0


class CallOptions(TypedDict, total=False):
    """Keywords of every call about a model.

    model: name of the model; default: the client's, else the only one served.
    timeout: seconds for the whole call, retries included; `math.inf` for none.
    """

    model: str | None
    timeout: float | None


class ScoreOptions(CallOptions, total=False):
    """Keywords of `score`.

    priority: higher is served first.
    request_id: an id of your own choice, for `cancel` and the logs.
    bypass_prefix_cache: neither read nor feed the prefix cache.
    cache_salt: share cached prefixes only with requests of the same salt.
    retain_prefix: keep the prefix cached for so many seconds after the end, for a next turn; a hint.
    user: your label of an end user, shown to operators.
    """

    priority: int | None
    request_id: str | None
    bypass_prefix_cache: bool
    cache_salt: str | None
    retain_prefix: float | None
    user: str | None


class OutputOptions(ScoreOptions, total=False):
    """Keywords of every call that generates; one that is given wins over `sampling` and `stop`.

    sampling: how tokens are chosen, as one object; the keywords after it are its fields.
    json_schema, regex, grammar, choices: what the output must be; at most one of them, see `Sampling`.
    stop: stop strings, or a `Stop`; `max_tokens` is its field.
    logprobs: log-probability of each token; n > 0 also gives the n best alternatives.
    prompt_logprobs: the same for the prompt.
    token_ids: return the ids of the generated tokens.
    omit_text: return no text.
    skip_special_tokens: leave special tokens out of the text (default true).
    timings: return where the time went (default true).
    """

    sampling: Sampling | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    sample_count: int | None
    json_schema: Mapping[str, object] | str | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    stop: Stop | str | Sequence[str] | None
    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool
    omit_text: bool
    skip_special_tokens: bool | None
    timings: bool


class GenerateOptions(OutputOptions, total=False):
    """Keywords of `generate`. add_special_tokens: whether the tokenizer adds its own to a text prompt."""

    add_special_tokens: bool | None


class StreamOptions(GenerateOptions, total=False):
    """Keywords of `stream`: at least so many seconds, or tokens, between two deltas."""

    min_chunk_interval: float | None
    min_chunk_tokens: int | None


class ChatOptions(OutputOptions, total=False):
    """Keywords of the chat calls.

    continue_final_message: leave the last turn open, so that the model continues it.
    template_kwargs: string variables for the chat template.
    """

    continue_final_message: bool
    template_kwargs: Mapping[str, str] | None


class StreamChatOptions(ChatOptions, total=False):
    """Keywords of the streaming chat calls: at least so many seconds, or tokens, between two deltas."""

    min_chunk_interval: float | None
    min_chunk_tokens: int | None


def refuse_unknown(options: Mapping[str, object], allowed: type, call: str) -> None:
    """Refuse a keyword that the call does not have.

    Raises:
        TypeError: as Python does for a plain function.
    """
    known: frozenset[str] = getattr(allowed, "__optional_keys__", frozenset())
    for name in options:
        if name not in known:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How to encrypt. Without files: the system's certificate authorities.

    Attributes:
        ca_file: PEM file of the authorities that sign servers.
        certificate_file: PEM file of this client's certificate, for mutual TLS.
        key_file: PEM file of its key.
        server_name: name to expect in the server's certificate, if it is not the target's.
    """

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        """Refuse half of what mutual TLS needs.

        Raises:
            InvalidRequest: a certificate without its key, or a key without its certificate.
        """
        if (self.certificate_file is None) != (self.key_file is None):
            missing = "key_file" if self.key_file is None else "certificate_file"
            raise _bad_setting("tls", f"has no {missing}: certificate_file and key_file are given together")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a client was told, environment included.

    Attributes:
        target: where the server is, as gRPC reads it.
        timeout: seconds for a call, retries included; infinite for none.
        connect_timeout: seconds for one attempt to connect.
        priority: added to requests that name none.
    """

    target: str
    timeout: float = DEFAULT_TIMEOUT_S
    connect_timeout: float = 5.0
    retry: Retry = field(default_factory=Retry)
    tls: TLS | None = None
    default_model: str = ""
    priority: int | None = None
    api_key: str = field(default="", repr=False)
    internal_token: str = field(default="", repr=False)


def _timeout_from_environment() -> float:
    text = os.environ.get("PAWL_TIMEOUT", "")
    if not text:
        return DEFAULT_TIMEOUT_S
    try:
        return _positive(float(text))
    except ValueError:
        raise _bad_setting("PAWL_TIMEOUT", f"is {text!r}; give seconds, such as 60") from None


def _positive(seconds: float) -> float:
    if math.isnan(seconds) or seconds <= 0:
        raise ValueError(seconds)
    return seconds


def _bad_setting(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {what}", violations=[FieldViolation(name, what)])


def settings_from(
    target: str | None,
    *,
    target_variable: str,
    default_target: str,
    api_key: str | None,
    timeout: float | None,
    retries: int | Retry | None,
    tls: bool | str | Path | TLS | None,
    default_model: str = "",
    internal_token: str = "",
) -> Settings:
    """Join arguments, environment and defaults, in that order.

    Raises:
        InvalidRequest: a value that cannot be: an empty target, a timeout that is not above 0, a key with a space.
    """
    address = target if target is not None else os.environ.get(target_variable) or default_target
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("grpc", "grpcs"):
        address = rest.rstrip("/")
        tls = tls if tls is not None else scheme == "grpcs"
    if not address.strip():
        raise _bad_setting("target", "is empty; give host:port, such as localhost:50051")
    if timeout is not None and not timeout > 0:
        raise _bad_setting("timeout", f"is {timeout}; give seconds above 0, or math.inf for none")
    if isinstance(tls, str | Path):
        tls = TLS(ca_file=Path(tls))
    elif isinstance(tls, bool) or tls is None:
        tls = TLS() if tls else None
    return Settings(
        target=address,
        timeout=timeout if timeout is not None else _timeout_from_environment(),
        retry=Retry.of(retries),
        tls=tls,
        default_model=default_model,
        api_key=secret("api_key", api_key if api_key is not None else os.environ.get("PAWL_API_KEY", "")),
        internal_token=internal_token,
    )


def with_changes(
    settings: Settings,
    *,
    timeout: float | None,
    retries: int | Retry | None,
    priority: int | None,
    default_model: str | None,
) -> Settings:
    """The settings with what is not None put in.

    Raises:
        InvalidRequest: a timeout that is not above 0, or a negative number of retries.
    """
    if timeout is not None and not timeout > 0:
        raise _bad_setting("timeout", f"is {timeout}; give seconds above 0, or math.inf for none")
    return replace(
        settings,
        timeout=settings.timeout if timeout is None else timeout,
        retry=settings.retry if retries is None else Retry.of(retries),
        priority=settings.priority if priority is None else priority,
        default_model=settings.default_model if default_model is None else default_model,
    )
