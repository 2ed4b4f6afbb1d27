"""Noise, penalties, filters and log-probabilities of one row, against naive oracles and transformers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.filters import choose, kept_tokens
from pawl_workers.sampling.logprobs import describe_tokens
from pawl_workers.sampling.noise import philox, uniform
from pawl_workers.sampling.state import RowSampler


def random_scores(seed: int, size: int = 300, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def naive_distribution(
    scores: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
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
    best_first = [i for i in best_first if weights[i] >= min_p]
    total = sum(weights[i] for i in best_first)
    return {i: weights[i] / total for i in best_first}


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], wanted: tuple[int, int, int, int]
) -> None:
    """The known-answer vectors of Random123, the authors' implementation."""
    assert philox(counter, key) == wanted


def test_uniform_is_a_function_and_uniform() -> None:
    """The same pair gives the same number; many pairs fill [0, 1) evenly (chi-square, 15 degrees)."""
    draws = [uniform(seed, position) for seed in range(40) for position in range(200)]
    assert draws == [uniform(seed, position) for seed in range(40) for position in range(200)]
    assert len(set(draws)) == len(draws)
    assert 0.0 <= min(draws) <= max(draws) < 1.0
    counts = np.bincount((np.array(draws) * 16).astype(int), minlength=16)
    assert ((counts - 500) ** 2 / 500).sum() < 37.7  # exceeded once in a thousand
    assert uniform(2**63, 1) != uniform(0, 1) != uniform(2**32, 1)


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 40, 299, 300, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    rounded=st.booleans(),
)
def test_filtered_distributions_equal_the_naive_one(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, rounded: bool
) -> None:
    """Every combination of filters keeps the same tokens with the same probabilities; rounding makes ties."""
    scores = random_scores(seed, scale=scale)
    if rounded:
        scores = (np.round(scores * 2) / 2).astype(np.float32)
    wanted = naive_distribution(scores, temperature, top_k, top_p, min_p)
    tempered = (scores - scores.max()) / np.float32(temperature)
    ids, weights = kept_tokens(tempered, top_k, top_p, min_p)
    kept = list(range(len(scores))) if ids is None else ids.tolist()
    assert kept == sorted(wanted)
    probabilities = weights / weights.sum()
    assert np.allclose(probabilities, [wanted[i] for i in kept], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (30, 0.9, 0.05)])
def test_filters_agree_with_transformers(top_k: int, top_p: float, min_p: float) -> None:
    """The chain of warpers of transformers keeps the same tokens."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    for seed in range(20):
        scores = random_scores(seed)
        warped = warpers(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(scores)[None])[0]
        wanted = warped.isfinite().nonzero().squeeze(1).tolist()
        ids, weights = kept_tokens((scores - scores.max()) / np.float32(0.7), top_k, top_p, min_p)
        assert (list(range(len(scores))) if ids is None else ids.tolist()) == wanted
        assert np.allclose(weights / weights.sum(), warped.softmax(-1)[wanted].numpy(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1)])
def test_draws_invert_the_cumulative_distribution(top_k: int, top_p: float, min_p: float) -> None:
    """Evenly spaced noise yields each token in proportion to its probability, in order of ids."""
    scores, num_draws = random_scores(4, size=50), 4000
    wanted = naive_distribution(scores, 1.3, top_k, top_p, min_p)
    drawn = [choose(scores, 1.3, top_k, top_p, min_p, (i + 0.5) / num_draws) for i in range(num_draws)]
    assert drawn == sorted(drawn, key=lambda token_id: -1 if token_id is None else token_id)
    for token_id in range(50):
        assert abs(drawn.count(token_id) - wanted.get(token_id, 0.0) * num_draws) <= 1.5


def test_choices_at_the_edges() -> None:
    """No noise reaches a token without weight; ties, tiny temperatures, and rows with nothing to choose."""
    scores = np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf], dtype=np.float32)
    assert {choose(scores, 1.0, 0, 1.0, 0.0, noise) for noise in (0.0, 0.49, 0.5, 1 - 2**-53)} == {1, 3}
    assert choose(scores, 0.0, 0, 1.0, 0.0, 0.9) == 1
    assert choose(random_scores(1), 1e-40, 0, 1.0, 0.0, 0.99) == int(random_scores(1).argmax())
    assert choose(scores, 1.0, 0, 1e-9, 0.0, 0.999) == 1
    assert choose(np.full(4, -np.inf, dtype=np.float32), 1.0, 0, 1.0, 0.0, 0.5) is None
    assert choose(np.array([0.0, np.nan], dtype=np.float32), 1.0, 0, 1.0, 0.0, 0.5) is None


@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=150),
    output=st.lists(st.integers(0, 99), max_size=150),
    split=st.integers(0, 150),
)
def test_penalties_equal_transformers_and_their_definition(prompt: list[int], output: list[int], split: int) -> None:
    """State built at once or token by token; repetition against transformers, the others as defined."""
    spec = SamplingSpec(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logit_bias={3: 2.0, 98: -50.0}
    )
    sampler = RowSampler(spec, prompt, output[:split])
    for token_id in output[split:]:
        sampler.observe(token_id)
    scores = random_scores(len(prompt), size=100)
    before = scores.copy()
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    wanted = processor(torch.tensor([prompt + output]), torch.from_numpy(scores)[None])[0].numpy().copy()
    for token_id in set(output):
        wanted[token_id] -= 0.4 + 0.25 * output.count(token_id)
    wanted[3] += 2.0
    wanted[98] -= 50.0
    assert np.allclose(sampler.adjust(scores, len(output)), wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(scores, before)


def test_suppression_ends_with_the_minimum() -> None:
    """Suppressed ids cannot be chosen until enough tokens were output; rows without needs stay untouched."""
    sampler = RowSampler(SamplingSpec(temperature=0.0, min_output_tokens=2, suppressed_ids=(1, 4)), [0], [])
    scores = np.array([0, 9, 1, 2, 8], dtype=np.float32)
    assert int(sampler.adjust(scores, 1).argmax()) == 3
    assert sampler.adjust(scores, 2) is scores
    assert not sampler.plain_greedy
    plain = RowSampler(SamplingSpec(temperature=0.0), [0], [])
    assert plain.plain_greedy
    assert plain.adjust(scores, 0) is scores


def test_logprobs_ranks_and_alternatives() -> None:
    """Against a sort of the log-softmax; equal logits share a rank and are listed by id."""
    scores = torch.from_numpy(np.stack([np.round(random_scores(seed, size=40)) for seed in range(6)]))
    chosen, counts = [random.Random(9).randrange(40) for _ in range(6)], [0, 1, 3, 10, 40, 100]
    wanted = scores.double().log_softmax(-1)
    for row, entry in enumerate(describe_tokens(scores, chosen, counts)):
        best = sorted(range(40), key=lambda i: (-scores[row, i].item(), i))[: counts[row]]
        assert entry.token_id == chosen[row]
        assert entry.logprob == pytest.approx(wanted[row, chosen[row]].item(), abs=1e-5)
        assert entry.rank == 1 + int((scores[row] > scores[row, chosen[row]]).sum())
        assert entry.alternative_ids == best
        assert entry.alternative_logprobs == pytest.approx(wanted[row, best].tolist(), abs=1e-5)
