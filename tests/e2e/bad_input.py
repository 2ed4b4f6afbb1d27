"""What a row of the tables of bad input is: one call that must fail, and what must come back.

Also the limits of the server that is tested and the messages that the rows are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from pawl.v1 import inference_pb2, types_pb2
from pawl_server.config import LimitSettings

__all__ = ["INF", "LIMITS", "NAN", "Row", "conversation", "generate", "ids", "text", "turn"]

# Small ones, all different, so that a row that goes over one limit goes over no other.
LIMITS = LimitSettings(
    max_request_bytes=65_536,
    max_metadata_bytes=8_192,
    max_prompt_bytes=600,
    max_prompt_tokens=200,
    max_output_tokens=220,
    max_stop_strings=3,
    max_stop_string_bytes=16,
    max_stop_token_ids=4,
    max_logit_bias=5,
    max_samples=12,
    max_constraint_bytes=400,
    max_choices=10,
    max_logprobs=6,
    max_messages=7,
    max_template_kwargs=2,
    max_continuations=3,
    max_tokenize_texts=8,
    max_cancel_ids=9,
    max_duration_s=60.0,
)
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, slots=True)
class Row:
    """One bad call.

    Attributes:
        method: such as "InferenceService/Generate".
        request: the message, or the bytes sent in its place.
        fields: paths of google.rpc.BadRequest, all of them.
        status: expected gRPC status.
        reason: expected ErrorInfo reason, "" = any.
        limit: setting of `LimitSettings` that the row goes over.
        metadata: sent beside the message.
        by_grpc: gRPC itself refuses it, so that there are no details.
    """

    name: str
    method: str
    request: Message | bytes
    fields: tuple[str, ...] = ()
    status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    reason: str = ""
    limit: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    by_grpc: bool = False


def ids(*token_ids: int) -> types_pb2.Prompt:
    return types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=token_ids))


def text(value: str) -> types_pb2.Prompt:
    return types_pb2.Prompt(text=value)


def generate(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"prompt": text("hello")} | fields))


def turn(content: str = "hi", role: int = types_pb2.ROLE_USER, **fields: Any) -> types_pb2.Message:
    return types_pb2.Message(role=role, content=content, **fields)  # type: ignore[arg-type]  # wrong roles, too


def conversation(*turns: types_pb2.Message, **fields: Any) -> types_pb2.Conversation:
    return types_pb2.Conversation(messages=turns or [turn()], **fields)
