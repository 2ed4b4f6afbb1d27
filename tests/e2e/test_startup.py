"""The start-up benchmark on a tiny model: every phase is seen, in order, and the server it leaves is gone."""

from __future__ import annotations

from pathlib import Path

from pawl_loadtest.peers.checkpoint import make_checkpoint
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.startup import PHASES, measure_start
from tests.fakes.servers import SMALL


async def test_every_phase_of_a_start_is_measured(tmp_path: Path) -> None:
    seconds = await measure_start(make_checkpoint(SHAPES["tiny"], tmp_path), SMALL)
    assert tuple(seconds) == PHASES
    assert all(value > 0 for value in seconds.values()), seconds
