"""Batch: one step as tensors, built once a step and read by every stage and layer.

Rows of tokens lie sequence after sequence, without padding. Knows no rows of the worker's table and no kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pawl_workers.sampling.batch import IntArray, SamplingBatch

__all__ = [
    "AttentionLayout",
    "AttentionShape",
    "Batch",
    "IntArray",
    "PromptRows",
    "SamplingBatch",
    "SequenceArrays",
]


class AttentionLayout:
    """What a kernel backend works out once a step for all layers; each backend has its own subclass."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of every layer: H query heads share K key-value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class SequenceArrays:
    """The sequences of one step, as arrays over S sequences and T tokens.

    Attributes:
        starts: first token row of each sequence, [S].
        lengths: tokens computed in this step, [S]; each at least 1.
        contexts: tokens of the sequence after this step, [S].
        positions: position of each token in its sequence, [T].
        sequence_of_token: [T], non-decreasing.
        block_tables: block of each `block_size` tokens, [S, most blocks]; 0, the null block, past the end.
    """

    starts: IntArray
    lengths: IntArray
    contexts: IntArray
    positions: IntArray
    sequence_of_token: IntArray
    block_tables: IntArray


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt positions of one row to be scored: token `target_ids[i]` stands after token row `first + i`."""

    row: int
    first: int
    first_position: int  # of target_ids[0]
    target_ids: IntArray
    num_alternatives: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64.
        rotary: cosines and signed sines, each [T, 1, rotary_dim], of each of the model's rotary embeddings.
        attention: the backend's layout.
        last: token rows whose logits are sampled from, [S'] int64, increasing, in the order of `sampling`.
        sampling: how.
        prompts: prompt positions to be scored.
    """

    token_ids: Tensor
    positions: Tensor
    rotary: tuple[tuple[Tensor, Tensor], ...]
    attention: AttentionLayout
    last: Tensor
    sampling: SamplingBatch
    prompts: list[PromptRows]

    def samples(self, stream: Tensor) -> Tensor:
        """The rows of a stream, [T, D], that are sampled from, [S', D]: the stream itself where all of them are."""
        return stream if self.last.shape[0] == stream.shape[0] else stream[self.last]

    def asked(self) -> IntArray:
        """Token rows that are sampled from or scored, [A], increasing, of a batch on a CPU."""
        scored = (np.arange(prompt.first, prompt.first + len(prompt.target_ids)) for prompt in self.prompts)
        last = self.last.numpy()
        return np.unique(np.concatenate([last, *scored])) if self.prompts else last
