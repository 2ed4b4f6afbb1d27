"""The text of one output: detokenizing and stop strings as one step per token.

Owns which text is certain after each token and which stop string ended it; knows nothing of streams.
"""

from __future__ import annotations

from pawl_server.frontend.detokenize import Detokenizer
from pawl_server.frontend.requests import StopRules
from pawl_server.frontend.stop_strings import StopMatcher

__all__ = ["OutputText"]


class OutputText:
    """Turns tokens into certain text.

    Stop strings are looked for only in the text that comes after the first `min_output_tokens` tokens.

    Args:
        detokenizer: None for a request without text; then every piece is empty.
        rules: stop strings and the number of tokens before which they do not count.

    Attributes:
        num_tokens: taken so far, shown or not.
        include_stop: whether what stopped the output, a string or a token, is part of it.
    """

    __slots__ = ("_detokenizer", "_least", "_matcher", "include_stop", "num_tokens")

    def __init__(self, detokenizer: Detokenizer | None, rules: StopRules) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(rules.strings, rules.include_stop)
        self._least = rules.min_output_tokens
        self.include_stop = rules.include_stop
        self.num_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that is complete; None so far. No token may follow one."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that became certain."""
        self.num_tokens += 1
        if self._detokenizer is None:
            return ""
        piece = self._detokenizer.push(token_id)
        if self.num_tokens <= self._least:
            return piece
        return self._matcher.push(piece) if piece else ""

    def skip(self) -> None:
        """Count a token whose text is not shown (a hidden stop token)."""
        self.num_tokens += 1

    def flush(self) -> str:
        """No token follows: the text held back. May complete a stop string; after one there is none."""
        if self._detokenizer is None or self.stop_string is not None:
            return ""
        tail = self._detokenizer.flush()
        if tail and self.num_tokens > self._least:
            text = self._matcher.push(tail)
            return text if self._matcher.matched else text + self._matcher.flush()
        return self._matcher.flush() + tail
