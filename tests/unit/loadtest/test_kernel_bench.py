"""The kernel benchmark: its limits worked out by hand, and a run whose parts add up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pawl_loadtest.kernel_bench.__main__ import main
from pawl_loadtest.kernel_bench.limits import limits_of_step
from pawl_loadtest.kernel_bench.report import phase_lines, run_lines
from pawl_loadtest.kernel_bench.single import parse_step, run_steps
from pawl_loadtest.kernel_bench.split import KERNELS, PYTHON, WatchedStep, parts_of, phases_of
from pawl_loadtest.kernel_bench.workloads import Cost, TimedRun, Watch, run_workload
from pawl_loadtest.peers.bounds import MachineLimits, Precision, bound
from pawl_loadtest.peers.checkpoint import make_checkpoint
from pawl_loadtest.peers.in_process import InProcess
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.workloads import Workload
from pawl_loadtest.steps import Driver
from pawl_workers.kernels.cpu_seconds import KernelSeconds, LayerSeconds
from pawl_workers.plan import StepResult
from pawl_workers.worker import Worker, WorkerOptions

TINY = SHAPES["tiny"]


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
        tiny, parse_step("2x3@10"), 2, 4, MachineLimits(flops=1e18, read_bytes=1.0, attention_flops=1e18), 2
    )
    kv = 2 * 2 * 2 * 32  # keys and values, 2 layers, 2 heads of 32
    assert reading == {"linears": layer * 2, "head": head * 2, "attention": 2 * 13 * kv * 4}
    computing = limits_of_step(
        tiny, parse_step("2x3@10"), 2, 4, MachineLimits(flops=1.0, read_bytes=1e18, attention_flops=0.5), 2
    )
    pairs = 2 * (11 + 12 + 13) + 2 * 13  # the last layer's are of the last tokens alone, which sample
    products = 6 * layer // 2 + 4 * 64 * (2 * 2 * 32) + 2 * layer // 2
    assert computing == {"linears": 2 * products, "head": 2 * 2 * head, "attention": 2 * pairs * 4 * 4 * 32}


def _step(text: str, *, seconds: float, planning_s: float = 0.5) -> WatchedStep:
    """20 seconds in layers and 10 of waits, 3 more around them, 4 in the head, 2 in sampling, 1 to prepare."""
    kernels = KernelSeconds(LayerSeconds(1, 10, 2, 6, 1), LayerSeconds(1, 4, 1, 3, 1), 3, 4, 2)
    result = StepResult(1, 1, [], [], [], [], [], prepare_s=1.0, forward_s=38.0, sample_s=2.5)
    return WatchedStep(parse_step(text), seconds, planning_s, result, kernels)


def test_parts_are_what_their_own_clocks_say() -> None:
    assert parts_of(_step("2x1@5", seconds=50.0)) == {
        "linears": 10,
        "attention": 6,
        "norms, rope, placing": 3,
        "experts": 1,
        "head": 4,
        "sampling": 2,
        "waits": 10,
        "planning": 0.5,
        "preparing": 1.0,
        "dispatch": 38.0 + 2.5 - 20 - 10 - 4 - 2,
    }
    assert (*KERNELS, *PYTHON) == tuple(parts_of(_step("2x1@5", seconds=50.0)))


def test_steps_are_added_up_by_phase_and_held_to_their_limits() -> None:
    steps = [_step("2x4@1", seconds=60.0), _step("2x1@5", seconds=44.0), _step("2x1@6", seconds=46.0)]
    limits = [{"linears": 7.0, "attention": 3.0, "head": 2.0}] * 3
    prompts, decode = phases_of(steps, limits)
    assert [(phase.name, phase.num_steps, phase.seconds) for phase in (prompts, decode)] == [
        ("prompts", 1, 60.0),
        ("decode", 2, 90.0),
    ]
    assert decode.parts == {name: 2 * seconds for name, seconds in parts_of(steps[1]).items()}
    assert decode.accounted == pytest.approx(2 * 42 / 90)  # no clock has seen 3 of 45 seconds
    assert decode.overhead == pytest.approx(1 - 2 * 36 / 90)  # all but kernels, those 3 seconds too
    assert decode.limit_share == pytest.approx(2 * 12 / 90)
    assert decode.of_limit("linears") == 7 / (10 + 4)  # with the waits after them
    assert decode.of_limit("attention") == 3 / (6 + 3)
    assert decode.of_limit("head") == 2 / 4
    text = "\n".join(phase_lines(decode))
    assert (
        "decode: 2 steps of 45000.00 ms, 27% of the limit; parts add up to 93%, Python and dispatch are 20.0%" in text
    )
    assert "attention            6000.000 ms, 13.3% of the step,  33% of its limit" in text


def test_the_sum_of_all_parts_is_held_to_the_time_without_a_watch() -> None:
    steps = [_step("2x4@1", seconds=60.0), _step("2x1@5", seconds=44.0)]
    run = TimedRun(Workload(2, 4, 2), [80.0, 70.0, 90.0], [104.0], 0.25, steps)
    assert run.accounted == pytest.approx(2 * 42 / 80)
    lines = run_lines(run, Cost(TINY, 2, 4, MachineLimits(1e9, 1e9, 1e9)))
    assert "the parts add up to 105% of the 80.000 s without a watch; others took up to 0.25 cores" in lines[0]


def test_the_parts_of_a_real_step_are_parts_of_it() -> None:
    worker = Worker.load(WorkerOptions("demo", max_running=2, max_batch_tokens=16, max_context=64, kernels="cpu"))
    step = run_steps(Driver(worker), parse_step("2x1@20"), repeats=1)[0]
    parts = parts_of(step)
    assert sum(parts.values()) <= step.seconds
    absent = {"experts", "planning", "sampling"}  # greedy tokens come with the head
    assert all(seconds > 0 for name, seconds in parts.items() if name not in absent), parts


def test_a_watched_workload_computes_what_the_bound_counts(tmp_path: Path) -> None:
    """Limits step by step, at a machine that is bound by one thing alone, are those of the whole workload."""
    workload = Workload(3, 5, 4)
    engine = InProcess(str(make_checkpoint(TINY, tmp_path)), 1, [workload], {"kernels": "cpu"})
    for can in (MachineLimits(1e18, 1e9, 1e18), MachineLimits(1e9, 1e18, 1e9)):
        phases = run_workload(engine, workload, rounds=1).phases(Cost(TINY, 2, 4, can))
        assert [(phase.name, phase.num_steps) for phase in phases] == [("prompts", 1), ("decode", 3)]
        least = bound(TINY, workload, Precision(2, 4), can)
        decode = phases[1].limits
        assert decode["linears"] + decode["head"] == pytest.approx(least.decode_linear.seconds)
        assert decode["attention"] == pytest.approx(least.decode_attention.seconds)
        assert sum(phases[0].limits.values()) == pytest.approx(
            least.prefill_linear.seconds + least.prefill_attention.seconds
        )


def test_a_watch_changes_no_token(tmp_path: Path) -> None:
    engine = InProcess(str(make_checkpoint(TINY, tmp_path)), 1, [Workload(2, 9, 5)], {"kernels": "cpu"})
    prompts = Workload(2, 9, 5).prompts(TINY.vocab_size, seed=3)
    watch = Watch(engine.worker)
    assert engine.run(prompts, 5, through=watch) == engine.run(prompts, 5)
    assert [step.shape.before for step in watch.steps] == [(0, 0), (9, 9), (10, 10), (11, 11), (12, 12)]


def test_a_run_reports_linears_steps_and_workloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    steps = ["--steps", "1x1@5", "2x4@8", "--rows", "1", "3", "--repeats", "2", "--workloads", "2x4/3", "2x6/1"]
    assert main(["--shape", "tiny", "--threads", "1", "--quick", "--json", str(path), *steps]) == 0
    printed = capsys.readouterr().out
    assert "gate and up [64, 256]" in printed
    assert "2 x 4 after 8: " in printed
    assert "prefill 2 x 6: " in printed
    figures = json.loads(path.read_text())
    assert [layer["rows"] for layer in figures["linears"]] == [1, 3] * 5
    assert set(figures["steps"]) == {"1 x 1 after 5", "2 x 4 after 8"}
    phases = figures["workloads"]["2 x 4/3"]["phases"]
    assert (phases["prompts"]["num_steps"], phases["decode"]["num_steps"]) == (1, 2)
    assert sum(phases["decode"]["parts"].values()) <= phases["decode"]["seconds"]


def test_what_is_no_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workloads", "16"]) == 2
    assert "REQUESTSxPROMPT/OUTPUT" in capsys.readouterr().err
