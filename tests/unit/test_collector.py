"""The garbage collector at the start of a process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from pawl_server.collector import collector_at_rest


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_inside_and_what_stays_is_left_alone_afterwards() -> None:
    with collector_at_rest():
        assert not gc.isenabled()
        kept: list[list[int]] = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert not any(known is kept for known in gc.get_objects())


def test_it_goes_back_to_work_after_a_start_that_failed() -> None:
    with pytest.raises(ZeroDivisionError), collector_at_rest():
        raise ZeroDivisionError
    assert gc.isenabled()
