"""Sampling over drawn parameters, histories and batches, against a naive sampler and against itself alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import Sampler, SamplingBatch, TokenMasks
from pawl_workers.sampling.noise import uniform
from pawl_workers.sampling.table import SamplingTable
from tests.fakes.sampling_oracle import Scores, adjusted, as_words, distribution, make_batch, random_scores

SAMPLERS: dict[str, Sampler] = {"cpu": CpuSampler(load_library()), "torch": TorchSampler()}
SIZES = [1, 2, 63, 64, 65, 130, 1000, 5000]
ROUNDING = 2e-5

specs = st.builds(
    SamplingSpec,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 64, 999, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.integers(-1, 4),
)


each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@contextmanager
def threads(number: int) -> Iterator[None]:
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def candidates(logits: list[float], spec: SamplingSpec, noise: NDArray[np.float64]) -> list[set[int]]:
    """Tokens that the noise may draw: one, or its neighbours where a sum is rounded across a boundary."""
    if spec.temperature == 0.0:
        return [{logits.index(max(logits))}] * len(noise)
    found: list[set[int]] = [set() for _ in noise]
    for step in (-1e-6, 0.0, 1e-6):
        near = msgspec.structs.replace(
            spec,
            top_p=spec.top_p + step if spec.top_p < 1.0 else 1.0,
            min_p=min(1.0, spec.min_p * (1 + step)),
        )
        probabilities = distribution(logits, near)
        ids, cumulative = np.array(list(probabilities)), np.cumsum(list(probabilities.values()))
        for move in (-ROUNDING, 0.0, ROUNDING):
            at = np.searchsorted(cumulative, noise + move, side="right").clip(0, len(ids) - 1)
            for tokens, token_id in zip(found, ids[at].tolist(), strict=True):
                tokens.add(token_id)
    return found


@each_sampler
@given(
    spec=specs,
    seed=st.integers(0, 10_000),
    size=st.sampled_from(SIZES),
    scale=st.sampled_from([1e-5, 0.1, 1.0, 4.0, 12.0, 1e4]),
    rounded=st.booleans(),
    prompt=st.lists(st.integers(0, 999), max_size=60),
    output=st.lists(st.integers(0, 999), max_size=60),
    bias=st.dictionaries(st.integers(0, 999), st.floats(-100, 100, width=32), max_size=5),
    suppressed=st.lists(st.integers(0, 999), max_size=4),
    minimum=st.sampled_from([0, 30]),
    allowed=st.none() | st.lists(st.integers(0, 999), min_size=1, max_size=80),
)
def test_draws_equal_the_naive_sampler(
    sampler: Sampler,
    spec: SamplingSpec,
    seed: int,
    size: int,
    scale: float,
    rounded: bool,
    prompt: list[int],
    output: list[int],
    bias: dict[int, float],
    suppressed: list[int],
    minimum: int,
    allowed: list[int] | None,
) -> None:
    """40 positions each: the naive distribution, inverted at their noise, gives the token. Rounding makes ties."""
    prompt, output, suppressed = ([token_id % size for token_id in ids] for ids in (prompt, output, suppressed))
    spec = msgspec.structs.replace(
        spec,
        logit_bias={token_id % size: value for token_id, value in bias.items()},
        min_output_tokens=minimum,
        suppressed_ids=tuple(suppressed),
    )
    scores = random_scores(seed, size, scale)
    if rounded:
        scores = (np.round(scores * 2) / 2).astype(np.float32)
    table = SamplingTable(1)
    table.add(0, spec, prompt, output)
    masks = None
    if allowed is not None:
        allowed = [token_id % size for token_id in allowed]
        masks = TokenMasks(as_words([allowed], size), np.zeros(40, dtype=np.int64))
    batch = make_batch(sampler, table, [0] * 40, range(40), num_output=[len(output)] * 40, masks=masks)
    chosen = sampler.choose(torch.from_numpy(scores).expand(40, -1).contiguous(), batch)
    logits = adjusted(scores, spec, prompt, output, allowed)
    if max(logits) == -math.inf:
        assert set(chosen.tolist()) == {-2}
        return
    noise = uniform(table.seed[np.zeros(40, dtype=np.int64)], np.arange(40))
    for token_id, tokens in zip(chosen.tolist(), candidates(logits, spec, noise), strict=True):
        assert token_id in tokens


def drawn_batch(
    sampler: Sampler, chosen_specs: list[SamplingSpec], size: int, seed: int
) -> tuple[Scores, SamplingBatch]:
    """A batch of these specs with histories, some of them masked."""
    rng = np.random.default_rng(seed)
    table, count = SamplingTable(len(chosen_specs)), len(chosen_specs)
    lengths = rng.integers(0, 50, count).tolist()
    for row, spec in enumerate(chosen_specs):
        table.add(row, spec, rng.integers(0, size, 20).tolist(), rng.integers(0, size, lengths[row]).tolist())
    masks = TokenMasks(
        rng.integers(0, 2**32, (2, -(-size // 32)), dtype=np.uint32), rng.choice([-1, -1, 0, 1], count).astype(np.int64)
    )
    scores = rng.standard_normal((count, size)).astype(np.float32) * rng.choice([0.5, 2.0, 8.0], (count, 1))
    batch = make_batch(
        sampler, table, range(count), rng.integers(0, 5000, count).tolist(), num_output=lengths, masks=masks
    )
    return scores.astype(np.float32), batch


def part_of(batch: SamplingBatch, index: NDArray[np.int64]) -> SamplingBatch:
    assert batch.masks is not None
    return replace(
        batch,
        rows=batch.rows[index],
        positions=batch.positions[index],
        num_output=batch.num_output[index],
        drafts=batch.drafts[index],
        masks=replace(batch.masks, of_sample=batch.masks.of_sample[index]),
    )


@each_sampler
@given(
    chosen_specs=st.lists(specs, min_size=2, max_size=20),
    size=st.sampled_from([65, 257, 4099]),
    seed=st.integers(0, 10_000),
    num_threads=st.sampled_from([1, 2]),
    picks=st.lists(st.integers(0, 19), min_size=1, max_size=20),
)
def test_no_bit_depends_on_the_batch(
    sampler: Sampler,
    chosen_specs: list[SamplingSpec],
    size: int,
    seed: int,
    num_threads: int,
    picks: list[int],
) -> None:
    """Tokens and log-probabilities of a sample are those it has alone, in any company, order and number of threads."""
    scores, batch = drawn_batch(sampler, chosen_specs, size, seed)
    alone, described_alone = [], []
    targets = np.random.default_rng(seed).integers(0, size, len(scores))
    counts = np.maximum(batch.table.alternatives, 0)
    for i in range(len(scores)):
        row, one = torch.from_numpy(scores[i : i + 1]), np.array([i])
        alone.append(int(sampler.choose(row, part_of(batch, one))[0]))
        described_alone += sampler.describe(row, np.array([0]), targets[one], counts[one]).entries(
            targets[one], counts[one]
        )
    index = np.array([pick % len(scores) for pick in picks])
    with threads(num_threads):
        together = sampler.choose(torch.from_numpy(scores[index]), part_of(batch, index))
        described = sampler.describe(torch.from_numpy(scores), index, targets[index], counts[index])
    assert together.tolist() == [alone[i] for i in index]
    assert described.entries(targets[index], counts[index]) == [described_alone[i] for i in index]


@each_sampler
@given(
    spec=specs,
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=100),
    output=st.lists(st.integers(0, 99), max_size=150),
    split=st.integers(0, 150),
    drafted=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_a_row_is_its_tokens(
    sampler: Sampler,
    spec: SamplingSpec,
    prompt: list[int],
    output: list[int],
    split: int,
    drafted: int,
    seed: int,
) -> None:
    """Sent whole, or resumed and grown token by token, or with its last tokens as drafts; and in a row used before."""
    scores = torch.from_numpy(random_scores(seed, 100))[None]
    whole = SamplingTable(1)
    whole.add(0, spec, prompt, output)
    position = len(prompt) + len(output)
    wanted = sampler.choose(scores, make_batch(sampler, whole, [0], [position], num_output=[len(output)]))
    known = output[: len(output) - min(drafted, len(output))]
    drafts = np.full((1, 5), -1, dtype=np.int64)
    drafts[0, : len(output) - len(known)] = output[len(known) :]
    grown = SamplingTable(2)
    other = SamplingSpec(repetition_penalty=3.0, logit_bias={1: 9.0}, min_output_tokens=9999, suppressed_ids=(2, 3))
    grown.add(1, other, [5, 6], [7])
    grown.free(1)
    grown.add(1, spec, prompt, known[:split])
    for token_id in known[split:]:
        grown.observe(np.array([1]), np.array([token_id]))
    batch = make_batch(sampler, grown, [1], [position], num_output=[len(output)], drafts=drafts)
    assert np.array_equal(sampler.choose(scores, batch), wanted)


@each_sampler
@given(
    spec=specs,
    seed=st.integers(0, 1000),
    drafts=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_drafts_are_verified_in_one_step(sampler: Sampler, spec: SamplingSpec, seed: int, drafts: list[int]) -> None:
    """Several positions of one row at once have the tokens of as many steps in which the drafts were output."""
    scores = torch.from_numpy(random_scores(seed, 5 * (len(drafts) + 1))).view(-1, 5)
    stepped, wanted = SamplingTable(1), []
    stepped.add(0, spec, [0, 1], [2])
    for i in range(len(drafts) + 1):
        one = make_batch(sampler, stepped, [0], [3 + i], num_output=[1 + i])
        wanted += sampler.choose(scores[i : i + 1], one).tolist()
        if i < len(drafts):
            stepped.observe(np.array([0]), np.array([drafts[i]]))
    table, width = SamplingTable(1), len(drafts)
    table.add(0, spec, [0, 1], [2])
    before = np.array([drafts[:i] + [-1] * (width - i) for i in range(width + 1)])
    counts = list(range(width + 1))
    batch = make_batch(
        sampler, table, [0] * len(counts), [3 + i for i in counts], num_output=[1 + i for i in counts], drafts=before
    )
    assert sampler.choose(scores, batch).tolist() == wanted
