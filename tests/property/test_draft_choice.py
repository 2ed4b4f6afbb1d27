"""The choice of drafts against trying out every choice."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_server.scheduler.draft_choice import choose_drafts

shares = st.floats(0.01, 0.98)
guesses = st.lists(st.tuples(shares, shares, st.integers(0, 3), st.floats(0.01, 2.0)), min_size=1, max_size=4)


def make(found: list[tuple[float, float, int, float]]) -> tuple[np.ndarray, np.ndarray]:
    places = np.arange(3)
    chances = np.array([np.where(places < length, first * later**places, 0.0) for first, later, length, _ in found])
    return chances, np.array([seconds for *_, seconds in found])


@settings(max_examples=300)
@given(
    found=guesses, num_tokens=st.integers(1, 8), step_s=st.floats(0.1, 5.0), fixed_s=st.floats(0.0, 1.0),
    most=st.integers(0, 12),
)  # fmt: skip
def test_no_other_choice_gives_more_tokens_a_second(
    found: list[tuple[float, float, int, float]], num_tokens: int, step_s: float, fixed_s: float, most: int
) -> None:
    """Of as many drafts, and, with room for all, of any number; time counted as dear as the choice counts it."""
    chances, seconds = make(found)
    counts = choose_drafts(chances, seconds, num_tokens=num_tokens, step_s=step_s, fixed_s=fixed_s, most=most)

    def rate(choice: tuple[int, ...]) -> float:
        gained = sum(chances[place, :count].sum() for place, count in enumerate(choice))
        taken = 1.1 * (fixed_s * any(choice) + float(np.dot(choice, seconds)))
        return float((num_tokens + gained) / (step_s + taken))

    assert counts.sum() <= most
    assert all(count <= length for count, (_, _, length, _) in zip(counts.tolist(), found, strict=True))
    mine = rate(tuple(counts.tolist()))
    assert mine >= num_tokens / step_s * (1 - 1e-12)
    room_for_all = most >= sum(length for _, _, length, _ in found)
    for choice in itertools.product(*(range(length + 1) for _, _, length, _ in found)):
        if room_for_all:
            assert mine >= rate(choice) * (1 - 1e-9)


@given(found=guesses, most=st.integers(1, 12))
def test_when_drafts_cost_nothing_all_are_taken_that_there_is_room_for(
    found: list[tuple[float, float, int, float]], most: int
) -> None:
    chances, seconds = make(found)
    counts = choose_drafts(chances, 0 * seconds, num_tokens=1, step_s=1.0, fixed_s=0.0, most=most)
    assert counts.sum() == min(most, sum(length for _, _, length, _ in found))
