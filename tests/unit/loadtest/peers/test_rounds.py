"""The protocol with engine processes, who runs when, and who agrees with the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pawl_loadtest.peers.driver import Driver, EngineError, tokens_of
from pawl_loadtest.peers.environments import EnvironmentUnavailable
from pawl_loadtest.peers.others import others_cores
from pawl_loadtest.peers.rounds import Agreement, Course, Reference, compare, run_rounds
from pawl_loadtest.peers.variants import Variant
from pawl_loadtest.peers.workloads import Workload
from tests.fakes.waiting import wait_until
from tests.unit.loadtest.peers.pieces import AFTER, BEFORE

FAKE_ENGINE = """
import os, sys
from pathlib import Path


class Engine:
    def __init__(self, checkpoint, threads, workloads, settings):
        self._settings, self._diary = settings, Path(checkpoint)
        self._note("starts")
        print("engines print to standard output")
        self.facts = {"threads": os.environ["OMP_NUM_THREADS"], "cores": len(os.sched_getaffinity(0))}

    def _note(self, what):
        with self._diary.open("a") as diary:
            diary.write(f"{self._settings.get('name')} {what}\\n")

    def generate(self, prompts, output_tokens):
        missing = int(self._settings.get("missing", 0))
        if "seconds" in self._settings:
            self._note(f"runs {len(prompts)} x {len(prompts[0])}/{output_tokens}")
        seconds = float(self._settings.get("seconds", 0.5))
        tokens = [[int(self._settings.get("token", prompt[0]))] * (output_tokens - missing) for prompt in prompts]
        return {"tokens": tokens, "seconds": seconds}

    def fail(self):
        raise LookupError("no such thing\\nand more")

    def die(self):
        sys.stderr.write("last words\\n")
        sys.stderr.flush()
        os._exit(3)

    def sleep(self):
        import time
        time.sleep(600)

    def close(self):
        self._note("ends")
"""


REFERENCE = Reference([[5], [6]], [[5, 5, 5, 5], [6, 6, 6, 6]], [[1.0, 1.0, 1e-5, 1.0], [1.0, 0.5, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("tokens", "table", "expected"),
    [
        ([[5, 5, 5, 5], [6, 6, 6, 6]], "exact", Agreement(1.0, None, None, True)),
        ([[5, 5, 9, 5], [6, 6, 6, 6]], "exact", Agreement(6 / 8, 2, 1e-5, True)),  # a tie
        ([[5, 5, 9, 5], [6, 6, 6, 6]], "coarse", Agreement(6 / 8, 2, 1e-5, False)),
        ([[5, 5, 9, 5], [6, 9, 6, 6]], "fp16", Agreement(3 / 8, 1, 0.5, False)),
    ],
)
def test_agreement(tokens: list[list[int]], table: str, expected: Agreement) -> None:
    assert compare(REFERENCE, tokens, table) == expected


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE_ENGINE)
    return script


def _start(engine: Path, stop_timeout_s: float = 60.0) -> Driver:
    log = engine.with_name("log")
    return Driver(Path(sys.executable), engine, log, threads=1, stop_timeout_s=stop_timeout_s)


def _load(driver: Driver, diary: Path, **settings: str) -> object:
    arguments = {"checkpoint": str(diary), "threads": 1, "workloads": [[1, 2, 3]], "settings": settings}
    return driver.call("load", arguments, 60.0)


def test_an_engine_answers_over_json_lines(engine: Path) -> None:
    with _start(engine) as driver:
        assert _load(driver, engine.with_name("diary"), name="a") == {"threads": "1", "cores": 1}
        prompts = [[7, 8], [9, 10]]
        result = driver.call("generate", {"prompts": prompts, "output_tokens": 3}, 60.0)
        assert (tokens_of(result), result["seconds"]) == ([[7, 7, 7], [9, 9, 9]], 0.5)
        with pytest.raises(EngineError, match=r"^LookupError: no such thing$"):
            driver.call("fail", {}, 60.0)
        assert driver.call("generate", {"prompts": [[1]], "output_tokens": 1}, 60.0)["seconds"] == 0.5
    assert engine.with_name("diary").read_text() == "a starts\na ends\n"
    assert "engines print to standard output" in engine.with_name("log").read_text()


def test_an_engine_that_dies_is_quoted(engine: Path) -> None:
    with _start(engine) as driver:
        _load(driver, engine.with_name("diary"))
        with pytest.raises(EngineError, match=r"die: the process ended: .*last words"):
            driver.call("die", {}, 60.0)
        with pytest.raises(EngineError, match="the process ended"):
            driver.call("generate", {}, 60.0)


def test_an_engine_that_hangs_is_ended(engine: Path) -> None:
    with _start(engine, stop_timeout_s=0.05) as driver:
        _load(driver, engine.with_name("diary"))
        with pytest.raises(EngineError, match="sleep: no answer in time"):
            driver.call("sleep", {}, 0.05)
    assert driver.ended


def _variant(name: str, table: str = "exact", **settings: str) -> Variant:
    return Variant(name, "pawl", "fake_engine.py", table, 4, settings={"name": name, **settings})


def _course(engine: Path, get_interpreter: Callable[[str], Path], rounds: int = 2) -> Course:
    return Course(
        checkpoint=engine.with_name("diary"),
        vocab_size=512,
        workloads=[Workload(2, 3, 4), Workload(3, 5, 1)],
        rounds=rounds,
        threads=1,
        check_tokens=4,
        logs=engine.parent,
        interpreter=get_interpreter,
        say=lambda text: None,
        engines=engine.parent,
    )


def test_engines_take_turns_and_never_overlap(engine: Path) -> None:
    course = _course(engine, lambda name: Path(sys.executable))
    outcomes = run_rounds(course, [_variant("a"), _variant("b")], REFERENCE)
    diary = engine.with_name("diary").read_text().splitlines()
    assert [line.split()[0] for line in diary[::2]] == ["a", "b", "b", "a"]
    assert all(end == start.replace("starts", "ends") for start, end in zip(diary[::2], diary[1::2], strict=True))
    for outcome in outcomes:
        assert outcome.failure is None
        assert outcome.agreement == Agreement(1.0, None, None, agrees=True)
        assert outcome.rates == {"2 x 3/4": {0: 16.0, 1: 16.0}, "prefill 3 x 5": {0: 30.0, 1: 30.0}}


def _served(**settings: str) -> Variant:
    return replace(_variant("served", **settings), paired_with="a")


def test_a_served_engine_takes_turns_with_its_partner_run_by_run(engine: Path) -> None:
    course = replace(
        _course(engine, lambda name: Path(sys.executable), rounds=1), workloads=[Workload(2, 3, 4)], pairs=3
    )
    served = _served(seconds="1.0")
    _, outcome = run_rounds(course, [_variant("a", seconds="0.8"), served], REFERENCE)
    assert outcome.failure is None
    assert outcome.pairs == {"2 x 3/4": {0: [0.8, 0.8, 0.8]}}
    assert outcome.rates == {"2 x 3/4": {0: 8.0}}
    assert outcome.cpu["2 x 3/4"][0]["client"] >= 0
    runs = [line.split()[0] for line in engine.with_name("diary").read_text().splitlines() if line.endswith("2 x 3/4")]
    assert runs == ["a", "a", "served", "served", "a", "a", "served"]  # the first alone, in its own turn


def test_a_pair_whose_tokens_differ_is_no_figure(engine: Path) -> None:
    course = _course(engine, lambda name: Path(sys.executable), rounds=1)
    _, outcome = run_rounds(course, [_variant("a"), _served(token="3")], REFERENCE)
    assert outcome.failure == "the tokens are not those of the engine that it takes turns with"
    assert outcome.rates == {}


def test_a_served_engine_without_its_partner_is_timed_alone(engine: Path) -> None:
    course = _course(engine, lambda name: Path(sys.executable), rounds=1)
    (outcome,) = run_rounds(course, [_served()], REFERENCE)
    assert (outcome.rates["2 x 3/4"], outcome.pairs) == ({0: 16.0}, {})


def test_the_machine_is_measured_before_and_after_each_run_of_pawl(engine: Path) -> None:
    measured = iter([BEFORE, AFTER] * 2)
    course = replace(_course(engine, lambda name: Path(sys.executable), rounds=1), measure=lambda: next(measured))
    pawl, other = run_rounds(course, [_variant("pawl"), _variant("other")], REFERENCE)
    best = BEFORE.better(AFTER)
    assert pawl.machines == {"2 x 3/4": {0: best}, "prefill 3 x 5": {0: best}}
    assert other.machines == {}
    assert list(measured) == []


def test_who_cannot_run_is_reported_and_stops_nobody(engine: Path) -> None:
    def get_interpreter(name: str) -> Path:
        if name == "gone":
            raise EnvironmentUnavailable("there is no such package")
        return Path(sys.executable)

    gone = Variant("gone", "gone", "fake_engine.py", "exact", 4)
    short = _variant("short", missing="1")
    outcomes = run_rounds(_course(engine, get_interpreter), [gone, short, _variant("a")], REFERENCE)
    assert [outcome.failure for outcome in outcomes] == [
        "there is no such package",
        "2 x 4 tokens were asked for; 2 x {3} came",
        None,
    ]
    assert len(outcomes[2].rates["2 x 3/4"]) == 2


def test_what_others_take_is_told_apart_from_what_the_engine_takes() -> None:
    program = "import time\nwhile time.process_time() < 0.4: pass\ninput()"
    with (
        others_cores(1 << 30) as beside_nobody,
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as engine,
    ):
        with others_cores(engine.pid) as beside_the_engine:
            _wait_for_cpu(engine.pid, 0.3)
        engine.communicate(b"\n")
    # On this machine there may be others; the engine itself is the difference.
    assert beside_nobody.cores - beside_the_engine.cores > 0.02


def _wait_for_cpu(process_id: int, seconds: float) -> None:
    def used() -> bool:
        times = psutil.Process(process_id).cpu_times()
        return bool(times.user + times.system >= seconds)

    wait_until(used)
