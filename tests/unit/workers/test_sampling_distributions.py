"""Chi-squared tests: over thousands of (seed, position) pairs each setting draws from its exact distribution."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import Sampler, TokenMasks
from pawl_workers.sampling.table import SamplingTable
from tests.fakes.sampling_oracle import adjusted, as_words, distribution, make_batch, p_value, random_scores

VOCAB_SIZE = 150
SEEDS, POSITIONS = 16, 1250
PROMPT, OUTPUT = [1, 2, 3, 3, 60, 149], [2, 7, 7, 7, 90, 12, 33, 64, 65]
ALLOWED = [0, 3, 7, 31, 32, 63, 64, 65, 90, 100, 127, 128, 149]

SETTINGS = {
    "temperature 1": SamplingSpec(),
    "temperature 0.4": SamplingSpec(temperature=0.4),
    "temperature 3": SamplingSpec(temperature=3.0),
    "top-k": SamplingSpec(top_k=17),
    "top-p": SamplingSpec(top_p=0.8),
    "min-p": SamplingSpec(min_p=0.08),
    "all filters": SamplingSpec(temperature=1.5, top_k=60, top_p=0.9, min_p=0.02),
    "repetition": SamplingSpec(repetition_penalty=1.8),
    "presence": SamplingSpec(presence_penalty=1.1),
    "frequency": SamplingSpec(frequency_penalty=0.6),
    "bias": SamplingSpec(logit_bias={5: 3.0, 2: -1.0, 140: 100.0, 12: -100.0, 141: 101.5}),
    "suppression": SamplingSpec(min_output_tokens=10, suppressed_ids=(4, 90, 91, 92)),
    "everything": SamplingSpec(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias={9: 1.0, 90: 4.0}, min_output_tokens=20, suppressed_ids=(8,),
    ),
}  # fmt: skip


def draws(sampler: Sampler, spec: SamplingSpec, allowed: list[int] | None) -> NDArray[np.int64]:
    """How often each token is drawn from one row of logits, [VOCAB_SIZE]."""
    table = SamplingTable(SEEDS)
    for row in range(SEEDS):
        table.add(row, msgspec.structs.replace(spec, seed=1000 + row * 2**40), PROMPT, OUTPUT)
    rows = np.repeat(np.arange(SEEDS), POSITIONS).tolist()
    size = len(rows)
    masks = None if allowed is None else TokenMasks(as_words([allowed], VOCAB_SIZE), np.zeros(size, dtype=np.int64))
    batch = make_batch(
        sampler, table, rows, list(range(POSITIONS)) * SEEDS, num_output=[len(OUTPUT)] * size, masks=masks
    )
    scores = torch.from_numpy(random_scores(5, VOCAB_SIZE, 1.5)).expand(size, -1).contiguous()
    return np.bincount(sampler.choose(scores, batch), minlength=VOCAB_SIZE)


def exact(spec: SamplingSpec, allowed: list[int] | None) -> NDArray[np.float64]:
    logits = adjusted(random_scores(5, VOCAB_SIZE, 1.5), spec, PROMPT, OUTPUT, allowed)
    found = distribution(logits, spec)
    return np.array([found.get(token_id, 0.0) for token_id in range(VOCAB_SIZE)])


@pytest.fixture(scope="module")
def compiled() -> Sampler:
    return CpuSampler(load_library())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_draw_from_their_exact_distribution(compiled: Sampler, setting: str, masked: bool) -> None:
    """20,000 draws of each. The seeds are fixed, so the p-values are too: the smallest of 26 is expected near 0.04."""
    spec, allowed = SETTINGS[setting], ALLOWED if masked else None
    assert p_value(draws(compiled, spec, allowed), exact(spec, allowed)) > 0.001


@pytest.mark.parametrize("setting", ["temperature 1", "all filters", "everything"])
def test_the_sampler_in_torch_draws_the_same(compiled: Sampler, setting: str) -> None:
    """Both invert one cumulative distribution at one noise; they differ where a rounded sum crosses it."""
    spec = SETTINGS[setting]
    found = draws(TorchSampler(), spec, None)
    assert p_value(found, exact(spec, None)) > 0.001
    assert np.abs(found - draws(compiled, spec, None)).sum() <= 4


FAULTS = {
    "a tenth too hot": (SamplingSpec(), SamplingSpec(temperature=1.1)),
    "one token more": (SamplingSpec(top_k=20), SamplingSpec(top_k=21)),
    "one token less": (SamplingSpec(top_k=20), SamplingSpec(top_k=19)),
    "less mass": (SamplingSpec(top_p=0.95), SamplingSpec(top_p=0.9)),
    "no penalty": (SamplingSpec(repetition_penalty=1.5), SamplingSpec()),
    "no count": (SamplingSpec(frequency_penalty=-1.0), SamplingSpec(presence_penalty=-1.0)),
    "no bias": (SamplingSpec(logit_bias={9: 1.0}), SamplingSpec()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_biased_sampler_is_caught(compiled: Sampler, fault: str) -> None:
    """The test above does not pass by chance: a small fault, planted, has a p-value that is no accident."""
    right, wrong = FAULTS[fault]
    assert p_value(draws(compiled, right, None), exact(right, None)) > 0.001
    assert p_value(draws(compiled, wrong, None), exact(right, None)) < 1e-9
