"""Prompts of an exact number of tokens, with a shared beginning where wanted.

Ids are drawn from the middle of the vocabulary, where no special tokens stand. Knows nothing of text.
"""

from __future__ import annotations

import random

__all__ = ["PromptSource"]


class PromptSource:
    """Draws prompts as token ids.

    Args:
        vocab_size: number of token ids of the model.
        shared_prefix: tokens that all prompts begin with.
        seed: same seed, same prompts.
    """

    def __init__(self, vocab_size: int, *, shared_prefix: int = 0, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 (a workload, not a secret)
        self._low = min(vocab_size - 1, vocab_size // 4)
        self._high = max(self._low, vocab_size - 1 - vocab_size // 16)
        self._prefix = self._draw(shared_prefix)

    def _draw(self, length: int) -> list[int]:
        return [self._random.randint(self._low, self._high) for _ in range(length)]

    def prompt(self, length: int) -> list[int]:
        """A prompt of `length` tokens; the shared beginning is part of it."""
        prefix = self._prefix[:length]
        return prefix + self._draw(length - len(prefix))
