"""The estimate of output lengths: a quantile of what was seen, raised by preemptions, and by how far one has come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.scheduler.output_lengths import OutputLengths


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60_000), min_size=50, max_size=300), st.sampled_from([0.3, 0.5, 0.9]))
def test_the_estimate_is_the_quantile_of_what_came_as_far(lengths: list[int], quantile: float) -> None:
    outputs = OutputLengths(quantile, memory=1e9)
    for length in lengths:
        outputs.observe(length)
    for so_far in (0, 10, 1000):
        longer = sorted(length for length in [*lengths, 128] if length >= so_far)
        if len(longer) > 20:
            estimate = int(outputs.expected(np.array([so_far]), 0.0)[0])
            low, high = (longer[min(int(q * len(longer)), len(longer) - 1)] for q in (quantile - 0.1, quantile + 0.05))
            assert low / 1.25 - 1 <= estimate <= high * 1.25 + 1


def test_what_came_further_than_anybody_is_expected_to_go_on_a_little() -> None:
    outputs = OutputLengths(0.5)
    outputs.observe(10)
    assert 5000 < int(outputs.expected(np.array([5000]), 0.0)[0]) < 6500


def test_preemptions_raise_the_quantile_and_calm_brings_it_back() -> None:
    outputs = OutputLengths(0.5)
    for length in (10, 20, 40, 80, 160, 320, 640):
        outputs.observe(length)
    usual = int(outputs.expected(np.array([0]), 0.0)[0])
    for _ in range(3):
        outputs.raise_quantile(1.0)
    assert outputs.quantile(1.0) == pytest.approx(0.8, abs=1 / 64)
    assert int(outputs.expected(np.array([0]), 1.0)[0]) > 2 * usual
    for _ in range(20):
        outputs.raise_quantile(1.0)
    assert outputs.quantile(1.0) == pytest.approx(0.95, abs=1 / 64)
    assert 0.6 < outputs.quantile(61.0) < 0.7
    assert outputs.quantile(1000.0) == 0.5
    assert int(outputs.expected(np.array([0]), 1000.0)[0]) == usual


def test_old_outputs_are_forgotten() -> None:
    outputs = OutputLengths(0.5, memory=50)
    for _ in range(500):
        outputs.observe(1000)
    for _ in range(500):
        outputs.observe(10)
    assert int(outputs.expected(np.array([0]), 0.0)[0]) < 15
