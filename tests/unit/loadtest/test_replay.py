"""A trace on the embedded model and in the simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pawl_loadtest.replay import main, replay
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.sim.measured import read_steps
from pawl_server.sim.streams import Segment
from pawl_server.sim.trace import SimulatedRequest, Trace
from pawl_workers.worker import Worker, WorkerOptions


def test_a_replay_ends_every_request_in_order_of_its_events() -> None:
    worker = Worker.load(
        WorkerOptions(model="demo", max_running=4, max_batch_tokens=64, max_context=128, num_blocks=32)
    )
    limits = SchedulerLimits(
        num_blocks=32, block_size=worker.facts.block_size, max_running=4, max_batch_tokens=64, max_context=128
    )
    requests = [
        SimulatedRequest(
            arrival_s=0.01 * number,
            prompt=(Segment(number, 20),),
            output_tokens=1 + number,
            max_output_tokens=1 + number,
        )
        for number in range(6)
    ]
    timeline = replay(worker, Trace("test", requests), limits)
    assert (timeline.arrived_s < timeline.first_token_s).all()
    assert (timeline.first_token_s <= timeline.ended_s).all()
    assert np.flatnonzero(timeline.first_token_s == timeline.ended_s).tolist() == [0]
    assert timeline.num_steps >= 6


def test_the_command_compares_both_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = tmp_path / "steps.csv"
    sizes = ["--requests", "8", "--rate", "100", "--scale", "0.02", "--max-context", "256"]
    assert main([*sizes, "--record", str(recorded)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "p99" in line] == ["first", "whole"]
    assert lines[-1].split()[:2] == ["steps", f"{len(read_steps(recorded))}.000"]
