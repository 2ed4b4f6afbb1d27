"""The comparison with other engines: sizes, bounds, tables, the protocol, and who runs when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pawl_loadtest.peers import environments
from pawl_loadtest.peers.bounds import MachineLimits, Precision, bound
from pawl_loadtest.peers.checkpoint import _architecture
from pawl_loadtest.peers.driver import Driver, EngineError, tokens_of
from pawl_loadtest.peers.environments import Environment, EnvironmentUnavailable, interpreter
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.others import others_cores
from pawl_loadtest.peers.report import Run, as_json, as_tables, base_of
from pawl_loadtest.peers.rounds import Agreement, Course, Outcome, Reference, compare, run_rounds
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.variants import VARIANTS, Variant, choose_variants
from pawl_loadtest.peers.workloads import NAMED, Workload, parse_workloads
from tests.fakes.waiting import wait_until

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
        return {"tokens": [[prompt[0]] * (output_tokens - missing) for prompt in prompts], "seconds": 0.5}

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


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_model_that_transformers_makes(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = _architecture(shape)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert shape.layer_weights + shape.head_weights == matrices  # tied: the embedding is the head
    assert shape.kv_per_token == 2 * shape.num_layers * model.config.num_key_value_heads * model.config.head_dim


def test_sizes_as_published() -> None:
    assert (SHAPES["smollm2-135m"].layer_weights + SHAPES["smollm2-135m"].head_weights) / 1e6 == pytest.approx(
        134.5, abs=0.1
    )
    assert (SHAPES["llama-3.2-1b"].layer_weights + SHAPES["llama-3.2-1b"].head_weights) / 1e9 == pytest.approx(
        1.24, abs=0.01
    )
    assert 4 * SHAPES["smollm2-135m"].kv_per_token == 46_080


def test_one_stream_is_bound_by_reading_the_weights() -> None:
    shape, limits = SHAPES["smollm2-135m"], MachineLimits(120e9, 31.7e9)
    least = bound(shape, Workload(1, 1, 1001), Precision(4, 0), limits)
    assert 1000 / least.decode_linear.seconds == pytest.approx(31.7e9 / 538e6, rel=0.01)
    half = bound(shape, Workload(1, 1, 1001), Precision(2, 0), limits)
    assert half.decode_linear.seconds * 2 == pytest.approx(least.decode_linear.seconds)


@given(
    st.sampled_from(sorted(SHAPES)),
    st.builds(Workload, st.integers(1, 40), st.integers(1, 60), st.integers(1, 30)),
    st.builds(Precision, st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([1.0, 2.0, 4.0])),
    st.builds(MachineLimits, st.floats(1e9, 1e15), st.floats(1e9, 1e13)),
)
def test_bound_equals_a_walk_through_the_steps(
    name: str, workload: Workload, precision: Precision, limits: MachineLimits
) -> None:
    shape = SHAPES[name]
    weights = shape.layer_weights + shape.head_weights
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * precision.kv_bytes

    def attention(num_queries: int, num_read: int, num_pairs: int) -> float:
        flops = num_pairs * shape.num_layers * shape.num_heads * 2 * 2 * shape.head_dim
        return num_queries * max(num_read * kv_bytes / limits.read_bytes, flops / limits.flops)

    seconds = max(
        2 * workload.requests * (workload.prompt_tokens * shape.layer_weights + shape.head_weights) / limits.flops,
        weights * precision.weight_bytes / limits.read_bytes,
    )
    pairs = sum(position + 1 for position in range(workload.prompt_tokens))
    seconds += attention(workload.requests, workload.prompt_tokens, pairs)
    length = workload.prompt_tokens
    for _ in range(workload.output_tokens - 1):
        length += 1
        seconds += max(
            2 * workload.requests * weights / limits.flops, weights * precision.weight_bytes / limits.read_bytes
        )
        seconds += attention(workload.requests, length, length)
    assert bound(shape, workload, precision, limits).seconds == pytest.approx(seconds)


def test_workloads_by_name_and_by_numbers() -> None:
    assert parse_workloads(["single", "3x5/7"]) == [NAMED["single"], Workload(3, 5, 7)]
    assert (NAMED["prefill"].unit, NAMED["prefill"].counted_tokens) == ("prompt tokens/s", 8 * 512)
    assert (NAMED["long"].unit, NAMED["long"].counted_tokens) == ("output tokens/s", 16 * 256)
    for wrong in ("16", "16x128", "0x1/1", "ax1/1"):
        with pytest.raises(ValueError, match="REQUESTSxPROMPT/OUTPUT"):
            parse_workloads([wrong])


def test_prompts_differ_between_rounds_and_repeat_with_the_seed() -> None:
    workload = Workload(3, 9, 1)
    assert workload.prompts(512, 1) == workload.prompts(512, 1) != workload.prompts(512, 2)
    assert [len(prompt) for prompt in workload.prompts(512, 1)] == [9, 9, 9]


def test_variants_by_environment_and_by_name() -> None:
    everyone = choose_variants(["all"], ["exact", "fp16", "coarse"])
    assert everyone == list(VARIANTS)
    chosen = choose_variants(["transformers generate"], ["exact"])
    assert [variant.name for variant in chosen] == ["pawl", "transformers generate"]
    assert {"transformers generate", "transformers continuous"} <= {
        variant.name for variant in choose_variants(["transformers"], ["exact"])
    }
    with pytest.raises(ValueError, match=r"known: all, .*transformers"):
        choose_variants(["tensor"], ["exact"])


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
        assert outcome.rates == {"2 x 3/4": [16.0, 16.0], "prefill 3 x 5": [30.0, 30.0]}


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


BEFORE = Machine(2, {"AVX2": 100e9, "AVX-512": 150e9}, 90e9, {"2147483648": 30e9}, "a note")
AFTER = Machine(2, {"AVX2": 80e9, "AVX-512": 200e9}, 95e9, {"2147483648": 25e9}, "a note")


def _run(*outcomes: Outcome) -> Run:
    tables = ("exact", "fp16")
    return Run(SHAPES["smollm2-135m"], "bfloat16", 3, [Workload(1, 32, 128)], tables, BEFORE, AFTER, 0.9, outcomes)


def _half_precision() -> Outcome:
    return Outcome(Variant("half", "x", "x.py", "fp16", 2, 2), rates={"1 x 32/128": [1.0, 1.0, 1.0]})


def _row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


def test_tables_show_ratios_limits_and_who_differs() -> None:
    rates = {"1 x 32/128": [50.0, 60.0, 55.0]}
    half = {"1 x 32/128": [25.0, 20.0, 27.5]}
    pawl = Outcome(VARIANTS[0], {}, Agreement(1.0, None, None, True), rates, {"1 x 32/128": [0.0, 0.02, 0.01]})
    differs, beside = Agreement(0.5, 3, 0.2, False), {"1 x 32/128": [0.31, 0.0, 0.0]}
    other = Outcome(Variant("other", "x", "x.py", "exact", 4, 4), {}, differs, half, beside)
    remote = Outcome(Variant("pawl over gRPC", "pawl", "x.py", "exact", 4), {}, Agreement(1.0, None, None, True), half)
    failed = Outcome(Variant("failed", "y", "y.py", "exact", 4), failure="ERROR: No matching distribution")
    run = _run(pawl, other, remote, failed)
    text = as_tables(run)
    assert "load average at the start: 0.90 (not idle!)" in text
    assert "55.0 (50.0-60.0)" in _row(text, "pawl ")
    assert "2.00 (2.00-3.00)" in _row(text, "other")
    assert "50 %, from 3 (0.2) DIFFERS" in _row(text, "other")
    assert "0.02" in _row(text, "pawl ")
    assert "0.31 DISTURBED" in _row(text, "other")
    assert "before: read: 30.0 GB/s of 2147 MB" in text
    assert "after:  read: 25.0 GB/s of 2147 MB" in text
    assert "50 % of it" in _row(text, "pawl over gRPC")
    assert _row(text, "failed") == "failed: did not run: ERROR: No matching distribution"
    least = bound(run.shape, run.workloads[0], Precision(2, 4), run.machine.limits("AVX2")).seconds
    assert run.limit_share(pawl, run.workloads[0], "AVX2") == pytest.approx(least / (128 / 55))
    assert "== fp16: fp16 KV: nobody ran" in text
    assert "other" in as_tables(_run(pawl, other, _half_precision())).partition("== fp16")[2]
    figures = json.loads(as_json(run, {"shape": "x"}))
    assert [row["failure"] for row in figures["variants"]] == [None, None, None, "ERROR: No matching distribution"]
    assert figures["variants"][0]["rates"] == rates
    assert figures["machine"]["peaks"] == {"AVX2": 100e9, "AVX-512": 200e9}
    assert figures["machine_before"]["peaks"] == {"AVX2": 100e9, "AVX-512": 150e9}
    assert figures["machine_after"]["gemm"] == figures["machine"]["gemm"] == 95e9
    assert figures["variants"][0]["binds"] == {"1 x 32/128": {"AVX2": "read weights", "AVX-512": "read weights"}}
    assert figures["variants"][1]["others"] == beside


def test_columns_are_as_wide_as_what_stands_in_them() -> None:
    """Each begins or ends at one place in all rows, whatever a row says."""
    rates = {"1 x 32/128": [50.0, 60.0, 55.0]}
    rows = [
        Outcome(VARIANTS[0], {}, Agreement(1.0, None, None, True), rates),
        Outcome(Variant("a" * 50, "x", "x.py", "exact", 4, 4), {}, Agreement(0.123, 7, 0.00321, False), rates),
        Outcome(Variant("b", "x", "x.py", "exact", 4, 4), {}, None, {"1 x 32/128": [12345.678, 9.0, 1.0]}),
    ]
    lines = as_tables(_run(*rows)).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("1 x 32/128, output"))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    for title in ("median (min-max)", "ratio", "of AVX2 limit", "same tokens"):
        end = table[0].index(title) + len(title)
        assert all(line[end - 1] != " " and line[end : end + 3] == "   " for line in table)


def test_a_limit_is_what_takes_most_of_the_least_time() -> None:
    shape, precision = SHAPES["smollm2-135m"], Precision(2, 4)
    limits = MachineLimits(100e9, 30e9)
    assert bound(shape, NAMED["single"], precision, limits).binds == "read weights"
    assert bound(shape, NAMED["prefill"], precision, limits).binds == "multiply"
    assert bound(shape, Workload(1, 60_000, 16), precision, limits).binds == "attend"
    assert bound(shape, Workload(256, 4096, 4096), precision, MachineLimits(1e15, 30e9)).binds == "read KV"


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


def test_a_table_without_its_own_pawl_takes_the_next_higher_precision() -> None:
    exact = Outcome(VARIANTS[0], rates={"x": [1.0]})
    lower = Outcome(Variant("pawl fp16 KV", "pawl", "pawl_engine.py", "fp16", 2), failure="not available")
    assert base_of([exact, lower], "fp16") is exact
    lower.failure = None
    assert base_of([exact, lower], "fp16") is lower
    assert base_of([exact, lower], "exact") is exact
    assert base_of([lower], "exact") is None


def test_an_environment_is_made_once_and_a_failure_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_TORCH", "torch==0")
    known = {
        "plain": Environment("json", ()),
        "missing": Environment("json", (("--no-index", "pawl-peer-that-is-not-there"),)),
    }
    monkeypatch.setattr(environments, "ENVIRONMENTS", known)
    said: list[str] = []
    python = interpreter("plain", tmp_path, said.append)
    assert python.is_file()
    assert python == interpreter("plain", tmp_path, said.append)
    assert said == [f"installing plain into {tmp_path / 'plain'}"]
    with pytest.raises(EnvironmentUnavailable, match="ERROR: No matching distribution found"):
        interpreter("missing", tmp_path, said.append)
    assert interpreter("pawl", tmp_path, said.append) == Path(sys.executable)


def test_what_a_peer_asks_for_is_installed_but_for_what_is_left_out(tmp_path: Path) -> None:
    needs = tmp_path / "needs.txt"
    arguments = ["hypothesis[numpy]==6", "sortedcontainers", str(needs)]
    subprocess.run([sys.executable, "-c", environments._NEEDS, *arguments], check=True, timeout=60)
    names = {line.split(">")[0].split("=")[0] for line in needs.read_text().splitlines()}
    assert "numpy" in names
    assert not {"sortedcontainers", "pandas"} & names  # left out; of an extra that was not asked for
    assert ";" not in needs.read_text()
