"""The kernel benchmark: its limits worked out by hand, and a run whose parts add up."""

from __future__ import annotations

import argparse

import pytest

from pawl_loadtest.kernel_bench import limits_of_step, main, parse_step, split
from pawl_loadtest.peers.bounds import MachineLimits
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.steps import Driver
from pawl_workers.worker import Worker, WorkerOptions


def test_steps_are_read_as_written() -> None:
    shape = parse_step("3x2@40")
    assert (shape.tokens, shape.before) == ((2, 2, 2), (40, 40, 40))
    for text in ("3x2", "0x1@5", "1x1@0", "1x1@5!"):
        with pytest.raises(argparse.ArgumentTypeError, match="ROWSxTOKENS@BEFORE"):
            parse_step(text)


def test_limits_are_bytes_or_operations() -> None:
    """The tiny shape by hand: 2 layers of 64 x (2 * 128 + 2 * 64) + 3 * 64 * 128 weights, a head of 512 x 64."""
    tiny, layer, head = SHAPES["tiny"], 2 * (64 * (2 * 128 + 2 * 64) + 3 * 64 * 128), 512 * 64
    reading = limits_of_step(
        tiny, parse_step("2x3@10"), 2, 4, MachineLimits(flops=1e18, read_bytes=1.0, attention_flops=1e18)
    )
    kv = 2 * 2 * 2 * 32  # keys and values, 2 layers, 2 heads of 32
    assert reading == {"linears": layer * 2, "head": head * 2, "attention": 2 * 13 * kv * 4}
    computing = limits_of_step(
        tiny, parse_step("2x3@10"), 2, 4, MachineLimits(flops=1.0, read_bytes=1e18, attention_flops=0.5)
    )
    pairs = 2 * (11 + 12 + 13)
    assert computing == {"linears": 6 * 2 * layer, "head": 2 * 2 * head, "attention": 2 * pairs * 4 * 2 * 4 * 32}


def test_the_parts_of_a_step_add_up() -> None:
    worker = Worker.load(WorkerOptions("demo", max_running=2, max_batch_tokens=16, max_context=64, kernels="cpu"))
    step = Driver(worker).run(parse_step("2x1@20"))
    parts = split(step)
    assert sum(parts.values()) == pytest.approx(step.seconds)
    assert all(seconds > 0 for seconds in parts.values()), parts


def test_a_run_reports_linears_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--steps", "1x1@5", "2x4@8", "--rows", "1", "3", "--repeats", "2"]
    assert main(["--shape", "tiny", "--threads", "1", "--quick", *steps]) == 0
    printed = capsys.readouterr().out
    assert "gate and up [64, 256]" in printed
    assert "2 x 4 after 8" in printed
    assert printed.count("of the limit") == 5 * 2 + 2
