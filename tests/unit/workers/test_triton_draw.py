"""Sampling in Triton's interpreter: the noise of the counter, and draws against a naive oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.kernels.triton import draw as module
from pawl_workers.kernels.triton.draw import draw
from pawl_workers.kernels.triton.sampler import TritonSampler
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import NOT_FINITE, NOTHING_LEFT, SamplingBatch, TokenMasks
from pawl_workers.sampling.table import SamplingTable


def _words(
    temperature: float, top_k: int, top_p: float, min_p: float, seeds: NDArray[np.int64], positions: NDArray[np.int64]
) -> Tensor:
    floats = np.array([[temperature, top_p, min_p]] * len(seeds)).view(np.int64)
    return torch.from_numpy(np.column_stack([floats, np.full(len(seeds), top_k), seeds, positions]))


def _uniform(seed: int, position: int) -> float:
    """Philox4x32-10 in plain integers (Salmon et al., 2011)."""
    mask = 0xFFFFFFFF
    c, k = [position & mask, position >> 32, 0, 0], [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return ((c[0] << 32 | c[1]) >> 11) * 2.0**-53


def _kept(scores: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Sort the whole vocabulary and apply each filter as it is defined, in plain Python."""
    weights = {i: math.exp((float(s) - float(scores.max())) / temperature) for i, s in enumerate(scores)}
    best_first = sorted(weights, key=lambda i: (-float(scores[i]), i))
    if top_k:
        best_first = best_first[:top_k]
    if top_p < 1.0:
        total, reached = sum(weights[i] for i in best_first), 0.0
        kept: list[int] = []
        for i in best_first:
            if kept and reached >= top_p * total:
                break
            kept.append(i)
            reached += weights[i]
        best_first = kept
    return {i: weights[i] for i in sorted(best_first) if weights[i] >= min_p}


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([5, 60, 150]),
    scale=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 40, 149, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    rounded=st.booleans(),
    block=st.sampled_from([32, 256]),
)
@settings(max_examples=12)
def test_draws_invert_the_filtered_distribution(
    seed: int,
    size: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    rounded: bool,
    block: int,
) -> None:
    """Small blocks do not hold the level sets, so that the whole row is searched; rounding makes ties."""
    generator = np.random.default_rng(seed)
    scores = (generator.standard_normal(size) * scale).astype(np.float32)
    if rounded:
        scores = (np.round(scores * 2) / 2).astype(np.float32)
    kept = _kept(scores, temperature, top_k, top_p, min_p)
    seeds, positions = generator.integers(-(2**63), 2**63, 2), generator.integers(0, 2**40, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        words = _words(temperature, top_k, top_p, min_p, seeds, positions)
        found = draw(torch.from_numpy(np.stack([scores] * 2)), words, adjusted=False)
    cumulative = np.cumsum(list(kept.values()))
    for token_id, key, position in zip(found.tolist(), seeds.tolist(), positions.tolist(), strict=True):
        assert token_id in kept
        place = list(kept).index(token_id)
        noise = _uniform(key % 2**64, position) * cumulative[-1]
        slack = 1e-6 * cumulative[-1]  # weights are rounded to float32
        assert cumulative[place] - kept[token_id] - slack <= noise <= cumulative[place] + slack


def test_greedy_rows_and_rows_without_a_token() -> None:
    scores = torch.zeros(6, 40)
    scores[0, [7, 9]] = 3.0  # the lower id among equals
    scores[1, 3] = torch.nan
    scores[2, 3] = -torch.inf
    scores[3, 3] = torch.inf
    scores[4] = -torch.inf
    scores[5, 30:] = -torch.inf
    seeds = np.arange(6)
    greedy, drawn = _words(0.0, 0, 1.0, 0.0, seeds, seeds), _words(1.0, 0, 1.0, 0.0, seeds, seeds)
    assert draw(scores, greedy, adjusted=False).tolist() == [7, -1, -1, -1, -1, -1]
    assert draw(scores, greedy, adjusted=True).tolist() == [7, -1, 0, -1, -2, 0]
    found = draw(scores, drawn, adjusted=True).tolist()
    assert found[1:2] + found[3:5] == [-1, -1, -2]
    assert found[2] != 3
    assert 0 <= found[5] < 30
    assert draw(scores[:0], greedy[:0], adjusted=False).shape == (0,)


def test_a_draw_depends_on_its_own_row_alone() -> None:
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.standard_normal((3, 60)).astype(np.float32))
    words = _words(0.8, 20, 0.9, 0.01, np.arange(3), np.arange(3) + 5)
    together = draw(scores, words, adjusted=False)
    for i in range(3):
        assert torch.equal(draw(scores[i : i + 1], words[i : i + 1], adjusted=False), together[i : i + 1])


def test_penalties_biases_and_masks_come_before_the_draw() -> None:
    """The samples of a step, adjusted and not, greedy and drawn, get the tokens that plain torch chooses."""
    specs = [
        SamplingSpec(temperature=0.0),
        SamplingSpec(temperature=0.0, logit_bias={5: 100.0}),
        SamplingSpec(temperature=0.9, top_k=30, seed=1, repetition_penalty=1.4, frequency_penalty=0.3),
        SamplingSpec(temperature=0.9, top_p=0.9, seed=2, min_output_tokens=4, suppressed_ids=(1, 2, 3)),
        SamplingSpec(temperature=1.2, seed=3),
        SamplingSpec(temperature=0.0, logit_bias={5: 100.0}),
        SamplingSpec(temperature=0.0),
    ]
    table, num = SamplingTable(len(specs)), len(specs)
    for row, spec in enumerate(specs):
        table.add(row, spec, [1, 2, 3, 4], [7, 7])
    scores = torch.randn(num, 70, generator=torch.Generator().manual_seed(1)) * 3
    scores[5, 9] = torch.nan
    masks = TokenMasks(np.array([[0, 1 << 9, 0]], dtype=np.uint32), np.array([-1] * (num - 1) + [0]))
    rows, drafts = np.arange(num), np.zeros((num, 0), dtype=np.int64)

    def choose(sampler: TorchSampler | TritonSampler) -> list[int]:
        batch = SamplingBatch(sampler, table, rows, np.full(num, 6), np.full(num, 2), drafts, masks)
        found: list[int] = sampler.choose(scores, batch).tolist()
        return found

    before = scores.clone()
    found = choose(TritonSampler())
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())
    assert found == choose(TorchSampler())
    assert found[1] == 5
    assert found[5:] == [-1, 41]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_chosen_ids_take_the_place_of_references(dtype: torch.dtype) -> None:
    """Over more than one block of tokens; where nothing was chosen stands a token that exists."""
    chooser = np.random.default_rng(5)
    chosen = torch.from_numpy(chooser.integers(0, 150_000, 300).astype(np.int32))
    chosen[7], chosen[8] = NOT_FINITE, NOTHING_LEFT
    token_ids = torch.from_numpy(chooser.integers(-300, 300, 700)).to(dtype)
    wanted = [max(0, int(chosen[-1 - i])) if i < 0 else i for i in token_ids.tolist()]
    TritonSampler().insert(token_ids, chosen)
    assert token_ids.tolist() == wanted
