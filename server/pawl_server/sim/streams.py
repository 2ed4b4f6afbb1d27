"""Texts without a tokenizer: endless streams of token ids, each a pure function of (stream, position).

A prompt is a list of segments, so prompts that begin with the same segments share a prefix, and a later turn of a
conversation may quote the output of an earlier one without anybody having kept it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EOS_TOKEN_ID", "VOCAB_SIZE", "IntArray", "Segment", "output_stream", "prompt_ids", "token_ids"]

IntArray = npt.NDArray[np.int64]

VOCAB_SIZE = 1 << 15
EOS_TOKEN_ID = 0

# Streams of outputs lie beyond those that workloads give to their prompts.
_FIRST_OUTPUT_STREAM = 1 << 30


@dataclass(frozen=True, slots=True)
class Segment:
    """The first `length` tokens of a stream."""

    stream: int
    length: int


def output_stream(index: int) -> int:
    """Stream that request number `index` generates."""
    return _FIRST_OUTPUT_STREAM + index


def token_ids(streams: IntArray | int, positions: IntArray) -> IntArray:
    """Tokens at these positions of these streams; broadcast like numpy. Never the end-of-text token.

    Source: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) over (stream, position).
    """
    mixed = (np.asarray(streams, np.uint64) << np.uint64(32)) + np.asarray(positions, np.uint64)
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (1 + (mixed >> np.uint64(33)) % np.uint64(VOCAB_SIZE - 1)).astype(np.int64)


def prompt_ids(segments: Sequence[Segment]) -> list[int]:
    """The text that these segments make."""
    parts = [token_ids(segment.stream, np.arange(segment.length)) for segment in segments]
    return [token_id for part in parts for token_id in part.tolist()]
