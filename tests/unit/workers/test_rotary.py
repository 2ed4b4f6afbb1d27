"""Angles that are looked up are those that are worked out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pawl_workers.model.rotary import rotary_angles, rotary_table
from pawl_workers.model.spec import RotarySpec

CPU = torch.device("cpu")
MOST = 8192


@given(
    pairs=st.integers(1, 70),
    scale=st.sampled_from([1.0, 1.25]),
    positions=st.lists(st.integers(0, MOST - 1), min_size=1, max_size=70),
    max_context=st.sampled_from([1, 100, MOST]),
)
def test_angles_looked_up_have_the_same_bits(pairs: int, scale: float, positions: list[int], max_context: int) -> None:
    """Those of positions beyond the table are worked out in both cases."""
    table = rotary_table(RotarySpec(theta=1e4, rotary_dim=2 * pairs, attention_factor=scale), max_context, CPU)
    assert 0 < table.cosines.shape[0] <= max_context
    at = torch.tensor(positions)
    looked_up = rotary_angles(table, at, torch.float32, max(positions))
    worked_out = rotary_angles(table, at, torch.float32)
    assert looked_up[0].shape == (len(positions), 1, 2 * pairs)
    assert torch.equal(looked_up[0], worked_out[0])
    assert torch.equal(looked_up[1], worked_out[1])


def test_the_table_is_bounded() -> None:
    """4 MiB, however long contexts are; a GPU has none."""
    table = rotary_table(RotarySpec(theta=1e4, rotary_dim=128), 1 << 17, CPU)
    assert table.cosines.nbytes + table.sines.nbytes == 1 << 22
    assert rotary_table(RotarySpec(theta=1e4, rotary_dim=128), 1 << 17, torch.device("meta")).cosines.shape[0] == 0


@pytest.mark.parametrize(("max_context", "factor"), [(48, 2.0), (49, 4.0)])
def test_which_of_two_stretches_serves_is_told(
    max_context: int, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers changes from one to the other as a text grows; a cache of keys cannot."""
    spec = RotarySpec(1e4, 2, "longrope", original_max_position=48, short_factors=(2.0,), long_factors=(4.0,))
    assert rotary_table(spec, max_context, CPU).frequencies.tolist() == [1 / factor]
    assert ["with max_context = 48 they are" in record.getMessage() for record in caplog.records] == (
        [True] if max_context > 48 else []
    )
