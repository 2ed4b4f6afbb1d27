"""Collects everything that is wrong with a message, so that the caller hears of it all at once.

Owns the checks that many fields share (ranges, sizes, counts, durations); knows no message of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from google.protobuf import duration_pb2

from pawl.errors import FieldViolation, InvalidRequest

__all__ = ["Violations", "visible_ascii"]

_MAX_DURATION_SECONDS = 315_576_000_000  # of google.protobuf.Duration


def visible_ascii(text: str) -> bool:
    """Whether a text has only the characters `!` to `~`."""
    return all("!" <= character <= "~" for character in text)


class Violations:
    """The fields of one message that are wrong. `path` is put before every field name."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._found: list[FieldViolation] = []

    def add(self, field: str, message: str) -> None:
        """Note that a field is wrong: what, with the value, the limit and the remedy."""
        self._found.append(FieldViolation(self._path + field, message))

    def check(self, good: bool, field: str, message: str) -> bool:
        """Note a violation unless `good`; returns `good`."""
        if not good:
            self.add(field, message)
        return good

    def number(
        self, field: str, value: float, low: float, high: float, limit: str = "", *, open_low: bool = False
    ) -> bool:
        """A number in [low, high], or (low, high] with `open_low`; NaN is in none. `limit` names the setting."""
        good = low < value <= high if open_low else low <= value <= high
        bracket = "(" if open_low else "["
        return self.check(good, field, f"{value:g} is not in {bracket}{low:g}, {high:g}]{_from(limit)}")

    def text(self, field: str, value: str, max_bytes: int, limit: str = "") -> bool:
        """A text of at most `max_bytes` bytes in UTF-8; `limit` names the setting."""
        size = len(value.encode())
        return self.check(size <= max_bytes, field, f"{size} bytes, at most {max_bytes} are allowed{_from(limit)}")

    def count(self, field: str, number: int, high: int, limit: str = "", *, low: int = 0) -> bool:
        """At least `low` and at most `high` elements; `limit` names the setting."""
        if number < low:
            self.add(field, f"{number} given, at least {low} needed")
            return False
        return self.check(number <= high, field, f"{number} given, at most {high} are allowed{_from(limit)}")

    def token_ids(self, field: str, ids: Collection[int], vocab_size: int) -> bool:
        """Ids in [0, vocab_size); the first wrong one is named."""
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            return True
        index, first = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
        self.add(f"{field}[{index}]", f"token id {first} is not in [0, {vocab_size - 1}]")
        return False

    def duration(
        self,
        field: str,
        value: duration_pb2.Duration,
        low: float,
        high: float,
        limit: str = "",
        *,
        open_low: bool = False,
    ) -> float:
        """A Duration as seconds, inside [low, high] or (low, high]; `low` if it is not. `limit` names the setting."""
        valid = abs(value.seconds) <= _MAX_DURATION_SECONDS and abs(value.nanos) < 1_000_000_000
        valid = valid and not (value.seconds > 0 > value.nanos or value.seconds < 0 < value.nanos)
        if not self.check(valid, field, f"{value.seconds} s and {value.nanos} ns is not a valid Duration"):
            return low
        seconds = value.seconds + value.nanos / 1e9
        good = (low < seconds if open_low else low <= seconds) and seconds <= high
        bracket = "(" if open_low else "["
        shown = f"{seconds:g} s is not in {bracket}{low:g} s, {high:g} s]{_from(limit)}"
        return seconds if self.check(good and math.isfinite(seconds), field, shown) else low

    def absorb(self, other: Violations) -> None:
        """Take over what another collector found, with its own paths."""
        self._found += other._found

    def raise_if_any(self) -> None:
        """End the check.

        Raises:
            InvalidRequest: something was wrong; carries every violation.
        """
        if not self._found:
            return
        first = self._found[0]
        more = f" (and {len(self._found) - 1} more)" if len(self._found) > 1 else ""
        raise InvalidRequest(f"{first.field}: {first.message}{more}", violations=self._found)


def _from(limit: str) -> str:
    return f" (server setting {limit})" if limit else ""
