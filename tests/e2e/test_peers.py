"""The comparison with other engines, whole: a tiny model, pawl and transformers, one round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pawl_loadtest.peers.__main__ import main
from tests.fakes.servers import ROOT, environment

DEADLINE_S = 150.0


@pytest.mark.parametrize("cap", [None, "avx2"])
def test_pawl_and_transformers_agree_and_are_timed(tmp_path: Path, cap: str | None) -> None:
    figures = tmp_path / "run.json"
    flags = ("--shape=tiny", "--quick", "--threads=1", f"--peers-dir={tmp_path}", f"--json={figures}")
    what = ("--kv", "exact", "--peers", "transformers generate", "--workloads", "2x16/4", "2x32/1")
    held = ("--at-most", cap) if cap else ()
    done = subprocess.run(
        [sys.executable, "-m", "pawl_loadtest.peers", *flags, *what, *held],
        env=environment({}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(figures.read_text())
    assert [row["name"] for row in run["variants"]] == ["pawl", "transformers generate"]
    for row in run["variants"]:
        assert row["failure"] is None
        assert row["agreement"] == {"share": 1.0, "first_difference": None, "margin": None, "agrees": True}
        assert set(row["rates"]) == {"2 x 16/4", "prefill 2 x 32"}
        assert all(list(rates) == ["0"] and rates["0"] > 0 for rates in row["rates"].values())
    machine = run["machine"]
    assert all(rate > 1e9 for rate in (*machine["peaks"].values(), *machine["read"].values(), machine["gemm"]))
    assert "== exact: fp32 KV, exact weights; ratios are pawl / the row's" in done.stdout
    assert [piece["cap"] for piece in run["pieces"]] == [cap]
    if cap:
        assert set(machine["peaks"]) <= {"AVX2", "gemm"}
        assert run["instructions"] in {"AVX2", "gemm"}
        assert "every engine is held to AVX2" in done.stdout
    both = tmp_path / "both.json"
    assert main(["--join", str(figures), str(figures), "--json", str(both)]) == 0
    assert json.loads(both.read_text())["rounds"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--peers", "nobody"), "peer 'nobody' is not known"),
        (("--workloads", "16"), "REQUESTSxPROMPT/OUTPUT"),
        (("--plot", "x.svg"), "give both"),
        (("--join", "missing.json"), "must be a file that --json wrote"),
    ],
)
def test_wrong_usage_is_told_apart(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1.5", "nan", "inf", "4.01", "1.5e9", "many", ""])
def test_weights_of_a_senseless_size_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([f"--kept-weight-bytes={value}"])
    assert left.value.code == 2
    assert f"{value!r}: must be bytes that a weight takes, above 0 and at most 4 (float32)" in capsys.readouterr().err
