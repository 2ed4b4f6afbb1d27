"""Compute threads find cores of their own: each case on a thread of its own, which may run where it is told to."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pawl_workers.kernels.native.build import find_or_build


class Seat(ctypes.Structure):
    """`Seat` of threads.h, which begins at every 64th byte."""

    _fields_ = [("core", ctypes.c_int32), ("moved", ctypes.c_double), ("_rest", ctypes.c_char * 48)]


def _take(first: int, allowed: Sequence[int], num_threads: int, moved: float = 0.0) -> tuple[int, float, set[int]]:
    """The second thread of a program sits down on `first`, where the first one is and it may run, too.

    Returns where it is noted to run then, when it was moved, and the cores that it may run on.
    """

    def run() -> tuple[int, float, set[int]]:
        memory = ctypes.create_string_buffer(64 * (num_threads + 1))
        aligned = -(-ctypes.addressof(memory) // 64) * 64
        seats = (Seat * num_threads).from_address(aligned)
        library = ctypes.CDLL(str(find_or_build()))
        library.empty_seats.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.take_seat.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        library.empty_seats(aligned, num_threads)
        seats[0].core, seats[1].moved = first, moved
        os.sched_setaffinity(0, {first})
        os.sched_setaffinity(0, allowed)
        library.take_seat(aligned, 1, num_threads)
        return seats[1].core, seats[1].moved, os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(60.0)


@pytest.fixture
def cores() -> list[int]:
    """Two that this process may run on."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("this process has one core")
    return mine[:2]


def test_a_thread_leaves_the_core_of_another_and_stays_free(cores: list[int]) -> None:
    for first, other in (cores, reversed(cores)):
        core, _, allowed = _take(first, cores, 2)
        assert core == other  # also if the kernel was quicker
        assert allowed == set(cores)


def test_it_stays_where_no_core_is_free_or_it_has_just_moved(cores: list[int]) -> None:
    first, _ = cores
    core, moved, allowed = _take(first, [first], 2)
    assert (core, allowed) == (first, {first})
    _, moved, allowed = _take(first, cores, 2, moved=1e12)
    assert (moved, allowed) == (1e12, set(cores))


def test_more_cores_than_threads_are_left_to_the_kernel(cores: list[int]) -> None:
    core, _, allowed = _take(cores[0], cores, 3)
    assert core in cores
    assert allowed == set(cores)
