"""The cost model: shapes by hand, planted coefficients found again, files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pawl_server.sim.cost import CostModel, MeasuredStep, StepShape, fit, load_cost, save_cost, shape_of
from pawl_server.sim.measured import RecordedStep, read_steps, write_steps
from pawl_server.sim.scenarios import bundled_cost

PLANTED = CostModel(step_s=2e-3, token_s=3e-5, attention_pair_s=4e-8, context_token_s=5e-7, sequence_s=6e-5)


def random_step(draw: random.Random) -> tuple[list[int], list[int]]:
    tokens = [draw.choice([1, 1, draw.randint(2, 200)]) for _ in range(draw.randint(1, 32))]
    return tokens, [count + draw.randint(0, 3000) for count in tokens]


def planted_steps(noise: float) -> list[MeasuredStep]:
    draw = random.Random(1)
    shapes = [shape_of(*random_step(draw)) for _ in range(200)]
    return [MeasuredStep(shape, PLANTED.seconds(shape) * draw.uniform(1 - noise, 1 + noise)) for shape in shapes]


def test_a_shape_counts_every_query_and_key() -> None:
    """Three tokens after seven see 8, 9 and 10; one token of a context of five sees 5."""
    assert shape_of([3, 1], [10, 5]) == StepShape(4, 2, 8 + 9 + 10 + 5, 15)


def test_planted_coefficients_are_found_again() -> None:
    found = fit(planted_steps(0.0))
    assert found.coefficients == pytest.approx(PLANTED.coefficients, rel=1e-6)
    assert found.fit is not None
    assert (found.fit.num_fitted, found.fit.num_held_out) == (160, 40)
    assert found.fit.mean_error < 1e-9


def test_the_held_out_error_is_that_of_the_noise() -> None:
    found = fit(planted_steps(0.1))
    assert found.fit is not None
    assert 0.02 < found.fit.mean_error < 0.08  # uniform noise of 10 % has a mean of 5 %


def test_no_coefficient_is_negative_even_if_that_fits_better() -> None:
    draw = random.Random(2)
    shapes = [shape_of(*random_step(draw)) for _ in range(100)]
    steps = [MeasuredStep(shape, 1.0 - 1e-5 * shape.context_tokens + 1e-6 * shape.num_tokens) for shape in shapes]
    assert min(fit(steps).coefficients) >= 0


def test_repeated_steps_take_what_each_alone_would() -> None:
    shape = shape_of([1] * 7, list(range(100, 107)))
    alone = [PLANTED.nanoseconds(shape_of([1] * 7, [c + k for c in range(100, 107)])) for k in range(1, 20)]
    assert PLANTED.repeated_nanoseconds(shape, 19).tolist() == alone


def test_files(tmp_path: Path) -> None:
    cost = fit(planted_steps(0.1), machine="a machine", model="a model")
    save_cost(cost, tmp_path / "cost.json")
    assert load_cost(tmp_path / "cost.json") == cost
    (tmp_path / "other.json").write_text('{"step_s": 1, "colour": "red"}')
    with pytest.raises(ValueError, match="not a cost model"):
        load_cost(tmp_path / "other.json")


def test_a_bundled_model_says_where_it_comes_from() -> None:
    assert bundled_cost("llama-8b-h100-analytic").source == "analytic"
    with pytest.raises(ValueError, match="llama-8b-h100-analytic"):
        bundled_cost("none")


@pytest.mark.parametrize("name", ["steps.csv", "steps.json"])
def test_recorded_steps_survive_a_file(tmp_path: Path, name: str) -> None:
    draw = random.Random(3)
    steps = []
    for _ in range(20):
        tokens, contexts = random_step(draw)
        steps.append(RecordedStep(seconds=draw.random(), tokens=tokens, contexts=contexts))
    write_steps(tmp_path / name, steps)
    expected = [MeasuredStep(shape_of(s["tokens"], s["contexts"]), s["seconds"]) for s in steps]
    assert read_steps(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seconds,tokens,contexts\n1.0,1 2,3\n", "2 tokens and 1 contexts"),
        ("seconds,tokens,contexts\n1.0,4,3\n", "holds all that it computed"),
        ("seconds,tokens\n1.0,4\n", "contexts"),
        ("seconds,tokens,contexts\n1.0,1,1\nx,1,1\n", "step 2"),
    ],
)
def test_bad_records_are_refused_by_number(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_steps(path)


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        fit(planted_steps(0.0)[:9])
