"""What one request experienced, and percentiles over many.

Definitions, the same in every report: *time to first token* runs from the moment the request was due (not
from when it was sent) to the first delta; a *gap* is the time between two deltas that carry tokens; *end to
end* runs from the due time to the end. Percentiles are exact, over raw samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Record", "Summary", "percentile", "summarize"]


@dataclass(slots=True)
class Record:
    """Times of one request, in seconds of one monotonic clock."""

    due: float
    sent: float
    first_token: float | None = None
    ended: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""
    _last: float | None = None

    def delta(self, now: float, tokens: int) -> None:
        """A delta with this many tokens arrived."""
        if tokens <= 0:
            return
        if self.first_token is None:
            self.first_token = now
        elif self._last is not None:
            self.gaps.append(now - self._last)
        self._last = now
        self.output_tokens += tokens


def percentile(values: Sequence[float], share: float) -> float:
    """Percentile by linear interpolation between order statistics; NaN of nothing. `share` in [0, 100]."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run. Times in seconds, rates per second."""

    num_requests: int
    num_errors: int
    errors: dict[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    cached_share: float
    time_to_first_token_s: dict[str, float]
    gap_s: dict[str, float]
    end_to_end_s: dict[str, float]
    dispatch_lateness_s: dict[str, float]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": percentile(values, share) for share in (50, 90, 95, 99)}


def summarize(records: Iterable[Record], duration_s: float) -> Summary:
    """Sum up a run that took `duration_s` seconds from its first due time to its last end."""
    everything = list(records)
    done = [record for record in everything if not record.error and record.ended is not None]
    errors: dict[str, int] = {}
    for record in everything:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    prompt_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in everything)
    span = max(duration_s, 1e-9)
    return Summary(
        num_requests=len(everything),
        num_errors=sum(errors.values()),
        errors=errors,
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(done) / span,
        output_tokens_per_s=output_tokens / span,
        prompt_tokens_per_s=prompt_tokens / span,
        cached_share=sum(record.cached_tokens for record in done) / max(1, prompt_tokens),
        time_to_first_token_s=_spread([r.first_token - r.due for r in done if r.first_token is not None]),
        gap_s=_spread([gap for record in done for gap in record.gaps]),
        end_to_end_s=_spread([r.ended - r.due for r in done if r.ended is not None]),
        dispatch_lateness_s=_spread([record.sent - record.due for record in everything]),
    )
