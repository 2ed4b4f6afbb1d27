"""The load generators against a real server: what they count is what they asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.load_generators import DEADLINE_S, locust, run_generator
from tests.fakes.servers import RunningServer, pawl_serve


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with pawl_serve() as running:
        yield running
        assert running.stop() == 0


def test_the_open_loop_counts_every_request_and_token(server: RunningServer, tmp_path: Path) -> None:
    figures = tmp_path / "run.json"
    load = ("--requests", "12", "--rate", "20", "--lengths", "8/4", "--json", str(figures))
    done = run_generator("pawl_loadtest", "--target", server.target, *load, "--max-lateness-ms", "1000")
    assert done.returncode == 0, done.stderr
    assert "12  (0 failed)" in done.stdout
    run = json.loads(figures.read_text())
    assert (run["num_requests"], run["num_errors"], run["errors"]) == (12, 0, {})
    assert (run["prompt_tokens"], run["output_tokens"]) == (12 * 8, 12 * 4)
    assert run["output_tokens_per_s"] == pytest.approx(48 / run["duration_s"])
    for share in ("p50", "p99"):
        assert 0 < run["time_to_first_token_s"][share] <= run["end_to_end_s"][share] < DEADLINE_S


@pytest.mark.parametrize(("flag", "message"), [("--lengths=8", "PROMPT/OUTPUT"), ("--requests=0", "above 0")])
def test_wrong_usage_is_told_apart(server: RunningServer, flag: str, message: str) -> None:
    done = run_generator("pawl_loadtest", "--target", server.target, flag)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_late_generator_fails_the_run(server: RunningServer) -> None:
    done = run_generator(
        "pawl_loadtest", "--target", server.target, "--requests=2", "--lengths=8/1", "--max-lateness-ms=0"
    )
    assert done.returncode == 1
    assert "load generator was late" in done.stderr


def test_refused_requests_fail_the_run_and_are_named(server: RunningServer, tmp_path: Path) -> None:
    figures = tmp_path / "run.json"
    load = ("--requests=2", "--rate=50", "--lengths=8/1000000", f"--json={figures}", "--max-lateness-ms=1000")
    done = run_generator("pawl_loadtest", "--target", server.target, *load)
    assert done.returncode == 1
    run = json.loads(figures.read_text())
    assert run["num_errors"] == 2
    assert list(run["errors"].values()) == [2]
    assert next(iter(run["errors"])).startswith("InvalidRequest")


def _rows(report: Path) -> dict[str, dict[str, str]]:
    with Path(f"{report}_stats.csv").open(newline="") as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_locust_reports_the_times_of_streams(server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "run"
    done = locust(server.target, report, "-u", "1", "-t", "5s")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(report)
    count = {name: int(row["Request Count"]) for name, row in rows.items()}
    assert count["end to end"] >= 5
    assert count["time to first token"] == count["dispatch lateness"] == count["end to end"]
    assert 0 < count["gap"] <= 3 * count["end to end"]
    assert not any(int(row["Failure Count"]) for row in rows.values())
    assert 0 < float(rows["time to first token"]["Median Response Time"]) <= float(rows["end to end"]["100%"])
    page = Path(f"{report}.html").read_text()
    assert all(name in page for name in ("time to first token", "gap", "end to end"))


def test_users_in_several_processes_share_the_rate(server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "run"
    done = locust(server.target, report, "--processes", "2", "-u", "2", "-t", "5s", PAWL_LOAD_RATE="8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"StreamUser": 2' in done.stdout + done.stderr
    assert int(_rows(report)["end to end"]["Request Count"]) >= 10


def test_locust_fails_when_requests_do(server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "run"
    done = locust(server.target, report, "-u", "1", "-t", "2s", PAWL_LOAD_OUTPUT_TOKENS="1000000")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "InvalidRequest" in Path(f"{report}_failures.csv").read_text()


def test_streams_that_never_end_are_not_left_out(server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "run"
    load = {"PAWL_LOAD_RATE": "40", "PAWL_LOAD_OUTPUT_TOKENS": "400", "PAWL_LOAD_FINISH_S": "0.1"}
    done = locust(server.target, report, "-u", "1", "-t", "2s", **load)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "still open 0.1 s after the end" in Path(f"{report}_failures.csv").read_text()


def test_wrong_requests_are_refused_in_time(server: RunningServer, tmp_path: Path) -> None:
    figures = tmp_path / "refusals.json"
    # The goal itself is for an idle machine.
    flags = ("--rounds=3", "--clients=2", "--max-median-ms=5000", f"--json={figures}")
    done = run_generator("pawl_loadtest.bad_input", "--target", server.target, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(figures.read_text())
    assert len(run["cases"]) >= 12
    assert {case["num_refused"] for case in run["cases"]} == {6}
    assert run["total"]["num_refused"] == 6 * len(run["cases"])
    assert run["total"]["wrong"] == {}
    for case in run["cases"]:
        assert case["name"] in done.stdout
        assert 0 < case["p50_s"] <= case["p99_s"]


def test_a_slow_refusal_fails_the_run(server: RunningServer) -> None:
    done = run_generator("pawl_loadtest.bad_input", "--target", server.target, "--rounds=1", "--max-median-ms=0")
    assert done.returncode == 1
    assert "the median is" in done.stderr
