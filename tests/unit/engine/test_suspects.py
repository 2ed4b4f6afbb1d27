from __future__ import annotations

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from pawl_server.engine.suspects import CRASH_WINDOW_S, MAX_CRASHES, Suspects


def test_one_crash_convicts_nobody() -> None:
    suspects = Suspects()
    assert suspects.crashed(["a"]) == []
    assert suspects.on_probation


def test_a_second_crash_convicts_the_one_that_has_not_proved_itself() -> None:
    suspects = Suspects()
    suspects.crashed(["a", "b", "c"])
    suspects.proved(["a"])
    assert suspects.crashed(["a", "b"]) == ["b"]


def test_a_newcomer_is_a_suspect_too() -> None:
    suspects = Suspects()
    suspects.crashed(["a", "b"])
    suspects.proved(["a"])
    assert suspects.crashed(["a", "new"]) == []
    assert suspects.crashed(["a", "new"]) == ["new"]


def test_a_good_step_takes_the_strike_away() -> None:
    suspects = Suspects()
    suspects.crashed(["a"])
    suspects.proved(["a"])
    assert not suspects.on_probation
    assert suspects.crashed(["a"]) == []


def test_probation_ends_when_every_suspect_is_gone() -> None:
    suspects = Suspects()
    suspects.crashed(["a", "b"])
    suspects.gone(["a"])
    assert suspects.on_probation
    suspects.gone(["b"])
    assert not suspects.on_probation


def test_crash_storm_needs_many_within_the_window() -> None:
    suspects = Suspects()
    slow = CRASH_WINDOW_S / (MAX_CRASHES - 1)
    assert not any(suspects.crash_storm(number * slow) for number in range(3 * MAX_CRASHES))
    suspects = Suspects()
    storms = [suspects.crash_storm(float(number)) for number in range(MAX_CRASHES)]
    assert storms == [False] * (MAX_CRASHES - 1) + [True]


@given(st.sets(st.integers(0, 11), min_size=1, max_size=4), st.integers(2, 12))
def test_among_any_sequences_exactly_the_guilty_are_convicted(guilty: set[int], num: int) -> None:
    """Sequences come back one at a time; a step crashes as soon as a guilty one is in it."""
    suspects = Suspects()
    live = list(range(num))
    convicted: set[Hashable] = set()
    assert suspects.crashed(live) == [] or guilty
    while True:
        running: list[int] = []
        for sequence in live:
            running.append(sequence)
            if sequence in guilty:
                break
            if suspects.on_probation:
                suspects.proved(running)
        else:
            break
        found = suspects.crashed(running)
        suspects.gone(found)
        convicted |= set(found)
        live = [sequence for sequence in live if sequence not in convicted]
    assert convicted == guilty & set(range(num))
