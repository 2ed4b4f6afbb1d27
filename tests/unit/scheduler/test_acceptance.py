"""What is believed of guesses: from their own tries, and from the others' while there are few."""

from __future__ import annotations

import random

import pytest

from pawl_server.scheduler.acceptance import Acceptance


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_comes_near_the_share_that_is_right(share: float) -> None:
    draw, acceptance, found = random.Random(3), Acceptance(50.0), []
    for count in range(2000):
        right = draw.random() < share
        acceptance.learn(2, int(right), wrong=not right)
        if count > 200:
            found.append(acceptance.first(2))
    assert sum(found) / len(found) == pytest.approx(share, abs=0.03)


def test_first_tokens_are_told_apart_by_what_they_rest_on_and_from_later_ones() -> None:
    acceptance = Acceptance(7.0)
    for _ in range(30):
        acceptance.learn(2, 0, wrong=True)
        acceptance.learn(4, 8, wrong=False)
    assert acceptance.first(2) < 0.1
    assert acceptance.first(4) > 0.85
    assert acceptance.later() > 0.85
    assert acceptance.first(3) == 0.3


def test_one_that_is_cut_off_says_nothing_of_what_was_not_compared() -> None:
    acceptance = Acceptance(7.0)
    acceptance.learn(2, 0, wrong=False)
    assert (acceptance.first(2), acceptance.later()) == (0.3, 0.3)
    acceptance.learn(2, 1, wrong=False)
    assert acceptance.first(2) > 0.5
    assert acceptance.later() == 0.3
    acceptance.learn(2, 1, wrong=True)
    assert acceptance.later() < 0.3


def test_who_has_shown_little_is_taken_for_one_of_the_others() -> None:
    others = Acceptance(50.0)
    for _ in range(100):
        others.learn(2, 1, wrong=False)
    one = Acceptance(7.0, others)
    assert one.first(2) > 0.9
    for _ in range(6):
        one.learn(2, 0, wrong=True)
    assert one.first(2) < 0.2
    assert others.first(2) > 0.9
    for _ in range(12):
        one.learn(2, 1, wrong=False)
    assert one.first(2) > 0.8
