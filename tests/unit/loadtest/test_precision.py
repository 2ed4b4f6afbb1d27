"""What smaller types cost, on the embedded model: the exact choice shifts nothing, the others a little."""

from __future__ import annotations

from pawl_loadtest.precision import CHOICES, measure
from pawl_workers.demo_model.corpus import held_out_questions


def test_effects_are_measured_against_the_exact_model() -> None:
    exact, *others = measure(held_out_questions(6, 3, None, 120))
    assert (exact.right, exact.same, exact.mean_shift, exact.largest_shift) == (1.0, 1.0, 0.0, 0.0)
    by_choice = dict(zip(CHOICES[1:], others, strict=True))
    for effect in others:
        assert 0 < effect.mean_shift <= effect.largest_shift < 0.5
    assert by_choice["float16", "auto"].mean_shift < by_choice["int8", "auto"].mean_shift
    assert by_choice["float16", "auto"].kv_bytes_per_token == exact.kv_bytes_per_token / 2
    assert by_choice["auto", "int8"].weight_bytes < exact.weight_bytes
