"""What crosses the pipes between `pawl serve` and its front ends: one order in, one answer out, as JSON lines."""

from __future__ import annotations

import msgspec

from pawl_server.config import Config
from pawl_server.serve.events import ServerAddresses

__all__ = ["Answer", "FrontendFailed", "FrontendOrder", "FrontendReady", "decode_answer", "decode_order", "encode"]


class FrontendOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a front end is told. Holds the token, so it travels on a pipe and never on a command line."""

    config: Config
    fleet_address: str
    token: str

    def __repr__(self) -> str:
        return f"FrontendOrder({self.fleet_address!r})"


class FrontendReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready", tag_field="event"):
    """It serves."""

    addresses: ServerAddresses


class FrontendFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", tag_field="event"):
    """It cannot serve; words for an operator. `invalid` = a setting is wrong."""

    message: str
    reason: str = "FRONTEND_FAILED"
    invalid: bool = False


Answer = FrontendReady | FrontendFailed

_encoder = msgspec.json.Encoder()
_order_decoder = msgspec.json.Decoder(FrontendOrder)
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def encode(message: FrontendOrder | Answer) -> bytes:
    """One line of JSON, with its line end."""
    return _encoder.encode(message) + b"\n"


def decode_order(line: bytes) -> FrontendOrder:
    """Decode and type-check an order.

    Raises:
        msgspec.DecodeError: the line is none.
    """
    return _order_decoder.decode(line)


def decode_answer(line: bytes) -> Answer:
    """Decode and type-check an answer.

    Raises:
        msgspec.DecodeError: the line is none.
    """
    return _answer_decoder.decode(line)
