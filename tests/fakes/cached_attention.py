"""Attention of the compiled kernels over a cache of any type, and what fp64 finds over the same cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.model.weights import AttentionRule
from tests.fakes.attention_cases import arrays_of

__all__ = ["CACHE_TYPES", "CachedAttention", "CachedCase", "check_all"]

CACHE_TYPES = (torch.float32, torch.float16, torch.int8)
_BLOCK = 32


@dataclass(frozen=True)
class CachedCase:
    """Heads, the rule, the type of the cache, and the tokens of each sequence."""

    shape: AttentionShape
    rule: AttentionRule
    cache_dtype: torch.dtype
    lengths: tuple[int, ...]
    seed: int = 0


class CachedAttention:
    """Queries, keys and values of every token of a case; the latter in the cache, in shuffled blocks."""

    def __init__(self, case: CachedCase) -> None:
        self._case, self._kernels = case, CpuKernels(case.cache_dtype)
        most = -(-max(case.lengths) // _BLOCK)
        num_blocks = most * len(case.lengths) + 1
        order = np.random.default_rng(case.seed).permutation(np.arange(1, num_blocks))
        self._tables = order.reshape(len(case.lengths), most)
        shapes = self._kernels.cache_shapes(num_blocks, case.shape)
        self._keys, self._values = (torch.zeros(shape, dtype=case.cache_dtype) for shape in shapes)
        generator = torch.Generator().manual_seed(case.seed)
        width = case.shape.num_heads + 2 * case.shape.num_kv_heads
        self._queries = []
        for i, length in enumerate(case.lengths):
            heads = torch.randn(length, width, case.shape.head_dim, generator=generator)
            layout = self._kernels.lay_out(arrays_of([(i, 0, length)], self._tables), case.shape)
            self._queries.append(self._kernels.place(heads, None, None, self._keys, self._values, layout))
        self._leave_no_numbers()

    def attend(self, parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """One step of (sequence, first position, end): what each part gives, [tokens, H, head_dim]."""
        layout = self._kernels.lay_out(arrays_of(parts, self._tables), self._case.shape)
        q = torch.cat([self._queries[i][start:end] for i, start, end in parts])
        found = self._kernels.attend(q, self._case.rule, self._keys, self._values, layout)
        return list(torch.split(found, [end - start for _, start, end in parts]))

    def _leave_no_numbers(self) -> None:
        """In the kernels' own memory: what a later step does not write it must not read."""
        for i, length in enumerate(self._case.lengths):
            layout = self._kernels.lay_out(arrays_of([(i, 0, length)], self._tables), self._case.shape)
            q = torch.full_like(self._queries[i], torch.nan)
            self._kernels.attend(q, self._case.rule, self._keys, self._values, layout)

    def exact(self, sequence: int) -> Tensor:
        """The same of all tokens of a sequence in fp64, [tokens, H, head_dim]."""
        shape, rule, q = self._case.shape, self._case.rule, self._queries[sequence].double()
        length, group = len(q), shape.num_heads // shape.num_kv_heads
        keys = self._widened(self._keys).transpose(2, 3)[self._tables[sequence]]  # [blocks, K, 32, padded]
        values = self._widened(self._values, of_values=True)[self._tables[sequence]]
        keys, values = (
            x.transpose(0, 1).flatten(1, 2)[:, :length, : shape.head_dim].repeat_interleave(group, 0)
            for x in (keys, values)
        )
        scores = torch.einsum("thd,hkd->htk", q, keys) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        ago = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (ago < 0) | (ago >= (rule.window or length))
        scores = scores.masked_fill(hidden, -torch.inf)
        if rule.sinks is not None:
            sinks = rule.sinks.double()[:, None, None].expand(-1, length, 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        return torch.einsum("htk,hkd->thd", weights, values)

    def _widened(self, cache: Tensor, *, of_values: bool = False) -> Tensor:
        """Keys [blocks, K, padded, 32], values [blocks, K, 32, padded]."""
        if self._case.cache_dtype is not torch.int8:
            return cache.double()
        blocks, heads, num_bytes = cache.shape
        padded = num_bytes // _BLOCK - 4
        scales = cache[..., padded * _BLOCK :].contiguous().view(torch.float32).double()
        raw = cache[..., : padded * _BLOCK].double()
        if of_values:
            return raw.view(blocks, heads, _BLOCK, padded) * scales[..., None]
        return raw.view(blocks, heads, padded, _BLOCK) * scales[..., None, :]


def check_all() -> str:
    """Some cases of every type of cache against fp64: a digest of what the kernels found.

    Raises:
        AssertionError: a result is off, or a token has other bits alone.
    """
    digest = hashlib.sha256()
    for cache_dtype in CACHE_TYPES:
        for shape, window, softcap in (
            (AttentionShape(9, 3, 64), None, None),
            (AttentionShape(7, 1, 40), 100, None),
            (AttentionShape(2, 2, 48), None, 5.0),
        ):
            case = CachedCase(shape, AttentionRule(0.2, window, softcap), cache_dtype, (70, 530))
            attention = CachedAttention(case)
            found = attention.attend([(0, 0, 70), (1, 0, 530)])
            for i, rows in enumerate(found):
                error = (rows - attention.exact(i)).abs().max().item()
                assert error < 2e-5, (case, error)
                alone = [attention.attend([(i, at, at + 1)])[0] for at in range(0, len(rows), 23)]
                assert torch.equal(torch.cat(alone), rows[::23]), case
                digest.update(rows.numpy().tobytes())
    return digest.hexdigest()
