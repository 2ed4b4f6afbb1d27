"""Finds stop strings in text that arrives in pieces, and holds back what may become one.

Owns the matching alone: which text is certain, which string matched; knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Looks for literal strings in a text. The result does not depend on how the text is cut.

    The match is the one that is complete first; of several that end at the same place, the longest.

    Args:
        strings: what to look for, none of them empty.
        include_stop: whether the string that matched is part of the text.

    Attributes:
        matched: the string that matched; None so far. Nothing may be pushed after a match.
    """

    __slots__ = ("_held", "_include", "_longest", "_prefixes", "_strings", "matched")

    def __init__(self, strings: Sequence[str], include_stop: bool) -> None:
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._include = include_stop
        self._longest = len(self._strings[0]) if self._strings else 0
        # Every proper beginning of a stop string: text that ends with one may become a match.
        self._prefixes = frozenset(s[:n] for s in self._strings for n in range(1, len(s)))
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece; returns the text that is now certain. Sets `matched` if a string is complete."""
        if not self._strings:
            return piece
        text = self._held + piece
        first: tuple[int, int, str] | None = None
        for string in self._strings:
            place = text.find(string)
            if place >= 0:
                candidate = (place + len(string), place, string)
                first = min(first, candidate) if first else candidate
        if first is not None:
            end, start, self.matched = first
            self._held = ""
            return text[: end if self._include else start]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """No text follows: what was held back for a match that never came."""
        rest, self._held = self._held, ""
        return rest

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[len(text) - length :] in self._prefixes:
                return length
        return 0
