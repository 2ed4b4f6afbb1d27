"""The smaller messages: tokenizer, model, cancel and admin calls, checked against the public contract.

Pure functions; owns their ranges and the page tokens, and knows neither the network nor the tokenizer.
"""

from __future__ import annotations

import base64

from pawl.v1 import admin_pb2, inference_pb2, model_pb2, tokenizer_pb2
from pawl_server.config import LimitSettings
from pawl_server.frontend.requests import ConversationInput
from pawl_server.frontend.validate_conversation import conversation
from pawl_server.frontend.violations import Violations

__all__ = [
    "cancel",
    "detokenize",
    "drain_grace_s",
    "model_name",
    "page",
    "page_token",
    "render",
    "tokenize",
    "watch_interval_s",
]

_MAX_REASON_BYTES = 256
_MAX_PAGE = 1000


def tokenize(message: tokenizer_pb2.TokenizeRequest, limits: LimitSettings) -> None:
    """Check a Tokenize call.

    Raises:
        InvalidRequest: with every violation.
    """
    found = Violations()
    if found.count("texts", len(message.texts), limits.max_tokenize_texts, "limits.max_tokenize_texts", low=1):
        total = sum(len(text.encode()) for text in message.texts)
        allowed = limits.max_prompt_bytes
        text = f"{total} bytes in all, at most {allowed} are allowed (server setting limits.max_prompt_bytes)"
        found.check(total <= allowed, "texts", text)
    found.raise_if_any()


def detokenize(message: tokenizer_pb2.DetokenizeRequest, limits: LimitSettings, vocab_size: int) -> None:
    """Check a Detokenize call.

    Raises:
        InvalidRequest: with every violation.
    """
    found = Violations()
    number = len(message.sequences)
    if found.count("sequences", number, limits.max_tokenize_texts, "limits.max_tokenize_texts", low=1):
        for index, sequence in enumerate(message.sequences):
            found.token_ids(f"sequences[{index}].ids", sequence.ids, vocab_size)
    found.raise_if_any()


def render(message: tokenizer_pb2.RenderChatRequest, limits: LimitSettings) -> ConversationInput:
    """Check a RenderChat call.

    Raises:
        InvalidRequest: with every violation.
    """
    found = Violations()
    checked = conversation(found, message.conversation, limits)
    found.raise_if_any()
    return checked


def cancel(message: inference_pb2.CancelRequest, limits: LimitSettings) -> None:
    """Check a Cancel call.

    Raises:
        InvalidRequest: with every violation.
    """
    found = Violations()
    found.count("request_ids", len(message.request_ids), limits.max_cancel_ids, "limits.max_cancel_ids", low=1)
    found.text("reason", message.reason, _MAX_REASON_BYTES)
    found.raise_if_any()


def model_name(message: model_pb2.GetModelRequest) -> str:
    """The id of a GetModel call, with or without "models/".

    Raises:
        InvalidRequest: no name.
    """
    found = Violations()
    name = message.name.removeprefix("models/")
    found.check(bool(name), "name", "required: 'models/{id}' or the id alone")
    found.raise_if_any()
    return name


def page(message: model_pb2.ListModelsRequest | admin_pb2.ListRequestsRequest, default: int) -> tuple[int, int]:
    """Page size and offset of a list call.

    Raises:
        InvalidRequest: a size out of range, or a token that this server did not give.
    """
    found = Violations()
    found.number("page_size", message.page_size, 0, _MAX_PAGE)
    offset = 0
    if message.page_token:
        try:
            kind, _, number = base64.urlsafe_b64decode(message.page_token.encode()).decode().partition(":")
            offset = int(number) if kind == "offset" else -1
        except ValueError:  # binascii.Error and UnicodeDecodeError are ValueErrors
            offset = -1
        found.check(offset >= 0, "page_token", "not a token of this server: give `next_page_token` back as it came")
    found.raise_if_any()
    return message.page_size or default, offset


def page_token(offset: int) -> str:
    """Token of the page that begins at `offset`."""
    return base64.urlsafe_b64encode(f"offset:{offset}".encode()).decode()


def watch_interval_s(message: admin_pb2.WatchLoadRequest) -> float:
    """Least time between two load reports, seconds.

    Raises:
        InvalidRequest: out of range.
    """
    if not message.HasField("min_interval"):
        return 1.0
    found = Violations()
    seconds = found.duration("min_interval", message.min_interval, 0.1, 60)
    found.raise_if_any()
    return seconds


def drain_grace_s(message: admin_pb2.DrainRequest, default: float) -> float:
    """How long running requests may take to finish, seconds.

    Raises:
        InvalidRequest: out of range.
    """
    if not message.HasField("grace_period"):
        return default
    found = Violations()
    seconds = found.duration("grace_period", message.grace_period, 0, 3600)
    found.raise_if_any()
    return seconds
