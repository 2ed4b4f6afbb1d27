"""Single steps of a given shape, on a worker without a scheduler."""

from __future__ import annotations

import argparse
import re

from pawl_loadtest.kernel_bench.split import WatchedStep
from pawl_loadtest.steps import Driver, Shape

__all__ = ["parse_step", "run_steps"]

_STEP = re.compile(r"(\d+)x(\d+)@(\d+)")


def parse_step(text: str) -> Shape:
    """A step written as ROWSxTOKENS@BEFORE: so many rows that each compute so many tokens after so many.

    Raises:
        argparse.ArgumentTypeError: it is not written so, or one of the numbers is 0.
    """
    found = _STEP.fullmatch(text)
    rows, tokens, before = map(int, found.groups()) if found else (0, 0, 0)
    if not (rows and tokens and before):
        raise argparse.ArgumentTypeError(f"{text!r}: must be ROWSxTOKENS@BEFORE, each above 0, such as 16x1@192")
    return Shape((tokens,) * rows, (before,) * rows)


def run_steps(driver: Driver, step: Shape, repeats: int) -> list[WatchedStep]:
    """Run one a few times, the fastest first, after one run to warm up.

    Raises:
        RuntimeError: the worker's kernels have no clocks.
    """
    driver.run(step)
    runs = sorted((driver.run(step) for _ in range(repeats)), key=lambda timed: timed.seconds)
    found = []
    for timed in runs:
        if timed.kernels is None:
            raise RuntimeError("the kernels have no clocks; must be cpu")
        found.append(WatchedStep(step, timed.seconds, 0.0, timed.result, timed.kernels))
    return found
