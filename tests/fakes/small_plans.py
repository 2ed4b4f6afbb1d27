"""The smallest plan there is, a prompt of four tokens in row 0 and block 1, to be varied field by field."""

from __future__ import annotations

import msgspec

from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan

__all__ = ["plan", "sequence"]

_GREEDY = SamplingSpec(temperature=0.0)


def sequence(row: int = 0, **changes: object) -> NewSequence:
    """Four tokens, none computed, with block 1 and greedy sampling, but for `changes`."""
    new = NewSequence(row, [1, 2, 3, 4], 4, 0, [1], _GREEDY)
    return msgspec.structs.replace(new, **changes)


def plan(**changes: object) -> StepPlan:
    """Step 1 of epoch 0, which computes all of `sequence()`, but for `changes`."""
    made = StepPlan(1, 0, [], [sequence()], [], [0], [4])
    return msgspec.structs.replace(made, **changes)
