"""What one request has been given so far: enough to continue it elsewhere without a gap or a repeat.

Owns the token indices: repeats are dropped, a gap is an error. Holds no text and outlives no request.
"""

from __future__ import annotations

from collections.abc import Sequence

from pawl_server.internal.v1 import engine_pb2

__all__ = ["Journal", "TokenGap"]


class TokenGap(Exception):
    """An engine left out a token."""


class Journal:
    """Prompt, parameters and emitted tokens of one request.

    Args:
        submit: the request as the first engine got it; `handle` and `resume_ids` are filled in per engine.

    Attributes:
        token_ids: the output so far.
    """

    __slots__ = ("_submit", "token_ids")

    def __init__(self, submit: engine_pb2.Submit) -> None:
        self._submit = submit
        self.token_ids: list[int] = list(submit.resume_ids)

    @property
    def seed(self) -> int:
        """Seed of the request, or of the sample."""
        return self._submit.sampling.seed

    @property
    def first_prompt_id(self) -> int:
        """First token of the prompt."""
        return self._submit.prompt_ids[0]

    def accept(self, indices: Sequence[int], token_ids: Sequence[int]) -> int:
        """Write down tokens; returns how many of the first are repeats and were dropped.

        Raises:
            TokenGap: an index is missing; nothing was written down.
        """
        expected = len(self.token_ids)
        if len(indices) == 1 and indices[0] == expected:  # nearly always
            self.token_ids.append(token_ids[0])
            return 0
        repeats = sum(index < expected for index in indices)
        news = list(indices[repeats:])
        if news != list(range(expected, expected + len(news))):
            raise TokenGap(f"expected token {expected}, got {list(indices[:8])}")
        self.token_ids += token_ids[repeats:]
        return repeats

    def resume(self) -> engine_pb2.Submit:
        """The request for another engine: same prompt, parameters and seed, and what was emitted so far."""
        submit = engine_pb2.Submit()
        submit.CopyFrom(self._submit)
        submit.ClearField("handle")
        submit.resume_ids[:] = self.token_ids
        return submit
