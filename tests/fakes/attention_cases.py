"""Steps of attention drawn by hypothesis, and their result by any kernels on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.batch import AttentionShape, IntArray, SequenceArrays
from pawl_workers.kernels import Kernels
from pawl_workers.kernels.rotation import split_and_turn
from pawl_workers.model.spec import QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights

__all__ = ["AttentionCase", "arrays_of", "attention_cases", "run_case"]


@dataclass(frozen=True)
class AttentionCase:
    """Heads, what turns and is normalised, the rule, and sequences as (tokens before, tokens in this step)."""

    shape: AttentionShape
    rotary_dim: int
    norms: QueryKeyNorm | None
    rule: AttentionRule
    sinks: bool
    sequences: tuple[tuple[int, int], ...]
    seed: int


@st.composite
def attention_cases(
    draw: st.DrawFn,
    *,
    head_dims: Sequence[int] = (2, 12, 16, 40),
    groups: Sequence[int] = (1, 2, 3, 7, 17),
    before: Sequence[int] = (0, 1, 63, 64, 300, 511, 512, 530),
    most_new: int = 12,
) -> AttentionCase:
    """Draw a step: groups and head dimensions that are no powers of two, contexts around tiles and splits."""
    kv_heads, group, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from(groups)), draw(st.sampled_from(head_dims))
    rule = AttentionRule(
        scale=draw(st.sampled_from([head_dim**-0.5, 0.3])),
        window=draw(st.sampled_from([None, 1, 5, 64, 100, 520])),
        softcap=draw(st.sampled_from([None, 0.5, 20.0])),
    )
    new = st.one_of(st.just(1), st.integers(1, most_new))
    return AttentionCase(
        shape=AttentionShape(kv_heads * group, kv_heads, head_dim),
        rotary_dim=draw(st.sampled_from([0, 2, head_dim // 4 * 2 or 2, head_dim])),
        norms=draw(st.sampled_from([None, *QueryKeyNorm])),
        rule=rule,
        sinks=draw(st.booleans()),
        sequences=tuple(draw(st.lists(st.tuples(st.sampled_from(before), new), min_size=1, max_size=3))),
        seed=draw(st.integers(0, 99)),
    )


def run_case(
    kernels: Kernels,
    case: AttentionCase,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[Sequence[tuple[int, int, int]]] | None = None,
) -> list[Tensor]:
    """Place and attend in steps, through shuffled blocks. Earlier tokens are written to the cache beforehand.

    Args:
        kernels: a backend whose blocks are [K, block size, head_dim].
        case: what is computed.
        device: of the tensors.
        dtype: of the tensors.
        parts: for each step (sequence, first position, end); None = all new tokens in one.

    Returns:
        For each sequence the results of its new tokens, [tokens, H, head_dim], in float32.
    """
    device = device or torch.device("cpu")
    shape, size = case.shape, kernels.block_size
    ends = [before + new for before, new in case.sequences]
    most = -(-max(ends) // size)
    num_blocks = most * len(ends) + 1
    order = np.random.default_rng(case.seed).permutation(np.arange(1, num_blocks))
    tables = order.reshape(len(ends), most)
    keys, values = (torch.zeros(cache, device=device, dtype=dtype) for cache in kernels.cache_shapes(num_blocks, shape))
    inputs = [_normal((case.seed, i), (end, _width(shape), shape.head_dim)) for i, end in enumerate(ends)]
    rule, norms = _weights(case, device, dtype)
    for i, (before, _) in enumerate(case.sequences):
        positions = np.arange(before)
        rotary = _rotary(positions, case.rotary_dim, device, dtype) if case.rotary_dim else None
        _, k, v = split_and_turn(inputs[i][:before].to(device, dtype), rotary, norms, shape.num_kv_heads)
        blocks, offsets = (torch.from_numpy(index) for index in (tables[i][positions // size], positions % size))
        keys[blocks, :, offsets], values[blocks, :, offsets] = k, v
    if parts is None:
        parts = [[(i, before, before + new) for i, (before, new) in enumerate(case.sequences)]]
    found: list[list[Tensor]] = [[] for _ in ends]
    for step in parts:
        arrays = arrays_of(step, tables)
        layout = kernels.lay_out(arrays, shape)
        heads = torch.cat([inputs[i][start:end] for i, start, end in step]).to(device, dtype)
        rotary = _rotary(arrays.positions, case.rotary_dim, device, dtype) if case.rotary_dim else None
        q = kernels.place(heads, rotary, norms, keys, values, layout)
        attended = kernels.attend(q, rule, keys, values, layout)
        for (i, _, _), rows in zip(step, torch.split(attended, arrays.lengths.tolist()), strict=True):
            found[i].append(rows.float())
    return [torch.cat(rows) for rows in found]


def _width(shape: AttentionShape) -> int:
    return shape.num_heads + 2 * shape.num_kv_heads


def _normal(seed: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def _weights(
    case: AttentionCase, device: torch.device, dtype: torch.dtype
) -> tuple[AttentionRule, QueryKeyNormWeights | None]:
    shape, rule = case.shape, case.rule
    if case.sinks:
        rule = AttentionRule(
            rule.scale, rule.window, rule.softcap, _normal((case.seed, 1, 2), (shape.num_heads,)).to(device)
        )
    if case.norms is None:
        return rule, None
    per_head = case.norms is QueryKeyNorm.HEAD
    query, key = (
        _normal((case.seed, 3, heads), (shape.head_dim * (1 if per_head else heads),)).to(device, dtype)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    return rule, QueryKeyNormWeights(case.norms, query, key, 1e-5)


def arrays_of(step: Sequence[tuple[int, int, int]], tables: IntArray) -> SequenceArrays:
    """A step of (sequence, first position, end)."""
    members, starts, ends = (np.array(column) for column in zip(*step, strict=True))
    lengths = ends - starts
    return SequenceArrays(
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        contexts=ends,
        positions=np.concatenate([np.arange(start, end) for _, start, end in step]),
        sequence_of_token=np.repeat(np.arange(len(step)), lengths),
        block_tables=tables[members],
    )


def _rotary(positions: IntArray, rotary_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.from_numpy(positions).float()[:, None, None] * torch.linspace(1, 0.01, rotary_dim // 2)
    cosines, sines = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return cosines.to(device, dtype), sines.to(device, dtype)
