"""Noise, penalties, masks and log-probabilities, of the compiled sampler and of the one in torch."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import NOT_FINITE, NOTHING_LEFT, Sampler, SamplingBatch, TokenMasks
from pawl_workers.sampling.noise import philox, uniform
from pawl_workers.sampling.table import SamplingTable
from pawl_workers.stages.sample import sample
from tests.fakes.sampling_oracle import as_words, make_batch, random_scores

INFINITY = float("inf")


@pytest.fixture(params=["cpu", "torch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return CpuSampler(load_library()) if request.param == "cpu" else TorchSampler()


def table_of(*specs: SamplingSpec) -> SamplingTable:
    table = SamplingTable(len(specs))
    for row, spec in enumerate(specs):
        table.add(row, spec, [0], [])
    return table


def choose(sampler: Sampler, scores: torch.Tensor, spec: SamplingSpec, positions: range = range(1)) -> list[int]:
    """One row of logits, drawn from at several positions."""
    batch = make_batch(sampler, table_of(spec), [0] * len(positions), positions)
    return [int(token_id) for token_id in sampler.choose(scores.expand(len(positions), -1).contiguous(), batch)]


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
    c0, c1, c2, c3, k0, k1 = (np.array([word], dtype=np.uint64) for word in (*counter, *key))
    assert tuple(int(word[0]) for word in philox((c0, c1, c2, c3), (k0, k1))) == wanted


def test_uniform_is_a_function_and_uniform() -> None:
    """The same pair gives the same number; many pairs fill [0, 1) evenly (chi-square, 15 degrees)."""
    seeds, positions = np.repeat(np.arange(40, dtype=np.uint64), 200), np.tile(np.arange(200), 40)
    draws = uniform(seeds, positions)
    order = np.random.default_rng(0).permutation(len(draws))
    assert np.array_equal(uniform(seeds[order], positions[order]), draws[order])
    assert len(set(draws.tolist())) == len(draws)
    assert 0.0 <= draws.min() <= draws.max() < 1.0
    counts = np.bincount((draws * 16).astype(int), minlength=16)
    assert ((counts - 500) ** 2 / 500).sum() < 37.7  # exceeded once in a thousand
    large = np.array([0, 2**63, 2**32], dtype=np.uint64)
    assert len(set(uniform(large, np.array([1, 1, 1])).tolist())) == 3


def test_draws_invert_the_cumulative_distribution_at_the_noise(sampler: Sampler) -> None:
    """From 4,096 equal logits the token is the noise's place among them: both samplers have the noise of noise.py."""
    seeds = [0, 1, 7, 2**32 + 5, 2**63 - 1, -3]
    table = table_of(*(SamplingSpec(seed=seed) for seed in seeds))
    rows, positions = np.repeat(np.arange(6), 50), np.tile(np.arange(50) * 91, 6)
    chosen = sampler.choose(torch.zeros(300, 4096), make_batch(sampler, table, rows.tolist(), positions.tolist()))
    assert chosen.tolist() == (uniform(table.seed[rows], positions) * 4096).astype(int).tolist()


def test_choices_at_the_edges(sampler: Sampler) -> None:
    """Ties, tiny temperatures, and no token without weight."""
    scores = torch.tensor([-INFINITY, 1.0, -INFINITY, 1.0, -INFINITY])
    mask = TokenMasks(as_words([[1, 3]], 5), np.zeros(60, dtype=np.int64))
    flat = torch.tensor([1.0] * 5).expand(60, -1).contiguous()
    table = table_of(SamplingSpec(), SamplingSpec(temperature=0.0), SamplingSpec(top_p=1e-9), SamplingSpec(top_k=1))
    found = [
        set(sampler.choose(flat, make_batch(sampler, table, [row] * 60, range(60), masks=mask)).tolist())
        for row in range(4)
    ]
    assert found == [{1, 3}, {1}, {1}, {1}]
    noisy = torch.from_numpy(random_scores(1))
    assert choose(sampler, noisy, SamplingSpec(temperature=1e-40)) == [int(noisy.argmax())]
    assert choose(sampler, noisy, SamplingSpec(min_p=1.0)) == [int(noisy.argmax())]
    assert choose(sampler, scores[1:2], SamplingSpec(top_p=0.5)) == [0]
    spread = torch.tensor([3e38, -3e38, 3e38])
    assert set(choose(sampler, spread, SamplingSpec(top_p=0.9), range(40))) == {0, 2}


def test_failures_leave_the_others_alone(sampler: Sampler) -> None:
    """Rows that are not finite, or that nothing is left of; the others have the tokens they have alone."""
    good = torch.from_numpy(np.stack([random_scores(seed, 70) for seed in range(5)]))
    scores = good.clone()
    scores[1, 69], scores[2, 3] = float("nan"), INFINITY
    spec = SamplingSpec(top_p=0.9, seed=4, logprobs=1)
    words = as_words([[], [5, 66]], 70)[:, :2]  # a mask that ends early allows nothing behind its end
    masks = TokenMasks(np.ascontiguousarray(words), np.array([-1, -1, -1, 0, 1]))
    batch = make_batch(sampler, table_of(spec), [0] * 5, range(5), masks=masks)
    chosen = sampler.choose(scores, batch)
    assert chosen[1:].tolist() == [NOT_FINITE, NOT_FINITE, NOTHING_LEFT, 5]
    assert chosen[0] == choose(sampler, good[0], spec)[0]
    sampled = sample(scores, batch)
    assert {i: message.split()[-1] for i, message in sampled.failures.items()} == {
        1: "finite",
        2: "finite",
        3: "choose",
    }
    assert [entry is not None for entry in sampled.logprobs] == [True, False, False, False, True]
    described = sampled.logprobs[4]
    assert described is not None
    # Untouched by the mask.
    assert described.alternative_ids == [int(good[4].argmax())]
    assert described.logprob == pytest.approx(float(good[4].log_softmax(-1)[5]), abs=1e-5)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (30, 0.9, 0.05)])
def test_filters_agree_with_transformers(sampler: Sampler, top_k: int, top_p: float, min_p: float) -> None:
    """Over a thousand draws exactly the tokens that the warpers of transformers keep are seen."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    spec = SamplingSpec(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed in range(5):
        scores = torch.from_numpy(random_scores(seed, scale=1.5))
        warped = warpers(torch.zeros(1, 1, dtype=torch.int64), scores[None])[0].softmax(-1)
        seen = set(choose(sampler, scores, msgspec.structs.replace(spec, seed=seed), range(1000)))
        assert seen <= set(warped.nonzero().squeeze(1).tolist())
        assert seen >= set((warped > 0.02).nonzero().squeeze(1).tolist())


def test_penalties_equal_transformers_and_their_definition(sampler: Sampler) -> None:
    """Repetition counts prompt and output, against transformers; presence and frequency count the output alone."""
    rng = random.Random(3)
    for seed in range(20):
        prompt, output = rng.choices(range(100), k=30), rng.choices(range(100), k=40)
        scores = torch.from_numpy(random_scores(seed, size=100))
        wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), scores[None].clone())[0]
        for token_id in set(output):
            wanted[token_id] -= 0.4 + 0.25 * output.count(token_id)
        wanted[3] += 2.0
        table = SamplingTable(1)
        spec = SamplingSpec(
            repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logit_bias={3: 2.0}, seed=seed
        )
        table.add(0, spec, prompt, output)
        batch = make_batch(sampler, table, [0] * 500, range(500), num_output=[40] * 500)
        before = scores.clone()
        chosen = sampler.choose(scores.expand(500, -1).contiguous(), batch)
        plain = make_batch(sampler, table_of(SamplingSpec(seed=seed)), [0] * 500, range(500))
        assert (chosen == sampler.choose(wanted.expand(500, -1).contiguous(), plain)).mean() > 0.998  # but for rounding
        assert torch.equal(scores, before)


def test_suppression_ends_with_the_minimum(sampler: Sampler) -> None:
    """Suppressed ids cannot be chosen until enough tokens were output, whatever their bias."""
    spec = SamplingSpec(temperature=0.0, min_output_tokens=2, suppressed_ids=(1, 4), logit_bias={4: 50.0})
    scores = torch.tensor([0.0, 9, 1, 2, 8]).expand(4, -1).contiguous()
    batch = make_batch(sampler, table_of(spec), [0] * 4, range(4), num_output=[0, 1, 2, 3])
    assert sampler.choose(scores, batch).tolist() == [3, 3, 4, 4]
    only = SamplingSpec(temperature=0.0, min_output_tokens=1, suppressed_ids=tuple(range(5)))
    assert sampler.choose(scores[:1], make_batch(sampler, table_of(only), [0], [0])).tolist() == [NOTHING_LEFT]


def test_logprobs_ranks_and_alternatives(sampler: Sampler) -> None:
    """Against a sort of the log-softmax; equal logits share a rank and are listed by id."""
    for size in (40, 200):
        scores = torch.from_numpy(np.stack([np.round(random_scores(seed, size=size)) for seed in range(6)]))
        rows, counts = np.array([0, 1, 1, 3, 4, 5]), np.array([0, 1, 3, 10, 40, 100])
        chosen = np.array(random.Random(9).choices(range(size), k=6))
        wanted = scores.double().log_softmax(-1)
        described = sampler.describe(scores, rows, chosen, counts)
        for i, entry in enumerate(described.entries(chosen, counts)):
            row = rows[i]
            best = sorted(range(size), key=lambda j: (-scores[row, j].item(), j))[: counts[i]]
            assert entry.token_id == chosen[i]
            assert entry.logprob == pytest.approx(wanted[row, chosen[i]].item(), abs=1e-5)
            assert entry.rank == 1 + int((scores[row] > scores[row, chosen[i]]).sum())
            assert entry.alternative_ids == best
            assert entry.alternative_logprobs == pytest.approx(wanted[row, best].tolist(), abs=1e-5)


def test_arrays_must_lie_in_one_piece() -> None:
    """Their addresses go to C: a strided view is refused, not misread."""
    batch = make_batch(TorchSampler(), table_of(SamplingSpec()), [0, 0, 0, 0], range(4))
    strided = SamplingBatch(batch.sampler, batch.table, batch.rows[::2], batch.positions[::2], batch.rows, batch.drafts)
    with pytest.raises(ValueError, match="in one piece"):
        CpuSampler(load_library()).choose(torch.zeros(2, 8), strided)
