"""How a sequence ends: the reasons, and the one event that tells of it. Plain data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

__all__ = ["EndReason", "Ended"]


class EndReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # noqa: S105 (a reason, not a secret)
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The one terminal event of a sequence. Times in seconds."""

    handle: Hashable
    request_id: str
    reason: EndReason
    detail: str
    stop_token_id: int
    cached_prompt_tokens: int
    output_tokens: int
    prefill_s: float
    decode_s: float
    stalled_s: float
    preemption_count: int
    field: str = ""  # of the request, where that is why it failed
