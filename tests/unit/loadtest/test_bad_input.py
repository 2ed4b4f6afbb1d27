"""Wrong requests: what counts as refused, and what fails the run."""

from __future__ import annotations

import grpc
import pytest

from pawl_loadtest.bad_input import Case, Refusals, _judge, main


def test_only_the_right_status_is_a_refusal() -> None:
    refusals = Refusals(Case("x", "Generate", b""))
    refusals.add(0.010, grpc.StatusCode.INVALID_ARGUMENT)
    refusals.add(0.001, grpc.StatusCode.OK)
    refusals.add(0.001, grpc.StatusCode.INTERNAL)
    assert refusals.seconds == [0.010]
    assert refusals.wrong == {"OK": 1, "INTERNAL": 1}
    assert refusals.figures() == {
        "name": "x",
        "num_refused": 1,
        "wrong": {"OK": 1, "INTERNAL": 1},
        "p50_s": 0.010,
        "p99_s": 0.010,
    }
    assert "1 x OK!" in refusals.line()


def test_a_case_that_was_never_refused_has_no_percentile() -> None:
    refusals = Refusals(Case("x", "Generate", b""), wrong={"OK": 3})
    assert refusals.figures()["p50_s"] is None
    assert "nan" in refusals.line()


@pytest.mark.parametrize(
    ("seconds", "wrong", "code", "message"),
    [
        ([0.01, 0.02, 9.0], {}, 0, ""),
        ([0.01, 0.02, 0.03], {"OK": 2}, 1, "2 requests ended with another status"),
        ([0.2, 0.2, 0.01], {}, 1, "the median is 200.0 ms, above 100"),
    ],
)
def test_judgement(
    seconds: list[float], wrong: dict[str, int], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _judge(Refusals(Case("all", "", b""), seconds, wrong), 100.0) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--rounds=0", "--clients=-1", "--rounds=x"])
def test_a_run_that_measures_nothing_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([flag])
    assert left.value.code == 2
    assert "must be a whole number above 0" in capsys.readouterr().err
