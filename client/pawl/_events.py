"""What a stream tells while an output is made, event by event: frozen plain data, no protobuf.

Every stream that is not cut off is a `Start`, deltas, an end for each sample, and an `End`. Knows nothing of how they
are added up to a completion (`_assembly` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from pawl._types import FinishReason, StopMatch, Timings, TokenLogprob, Usage

__all__ = ["Delta", "End", "Event", "SampleEnd", "Start"]


@dataclass(frozen=True, slots=True)
class Start:
    """The request was admitted. Comes again, with new values, if the stream broke before its first delta."""

    request_id: str
    model: str
    seed: int
    created: datetime | None


@dataclass(frozen=True, slots=True)
class Delta:
    """A further piece of the output of sample `index`, never a repeat; `token_offset` is that of its first token."""

    text: str
    token_offset: int
    token_count: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class SampleEnd:
    """The output of sample `index` is complete."""

    finish_reason: FinishReason
    stop_match: StopMatch | None
    output_tokens: int
    index: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """Last event of every stream that was not cut off."""

    usage: Usage
    timings: Timings | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


Event: TypeAlias = Start | Delta | SampleEnd | End
