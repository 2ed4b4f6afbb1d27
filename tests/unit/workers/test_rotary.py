"""Angles that are looked up are those that are worked out."""

from __future__ import annotations

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
