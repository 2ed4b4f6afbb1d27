"""What the operations of a compiled model are, what they read and write, and how they follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from pawl_workers.kernels.native.structures import Operation

__all__ = ["Buffer", "Cut", "Kind", "Router", "Segment"]


class Kind(IntEnum):
    """What an operation does, as in program.c."""

    NORM = 0
    LINEAR = 1
    PLACE = 2
    ATTEND = 3
    MERGE = 4
    GROUP = 5
    GATHER = 6
    UP = 7
    DOWN = 8
    COMBINE = 9
    EMBED = 10
    SCORE = 11  # a linear layer: the head
    QUANTISE = 12  # what is in the place of all logits where the best token is all that is asked for
    SCREEN = 13
    CHOOSE = 14


class Buffer(IntEnum):
    """What operations read and write; program.c knows four by their numbers."""

    STREAM = 0  # [T, D]
    NORMED = 1  # [T, D]
    NORMED_AGAIN = 2  # [T, D], for the MLP of a parallel block that has a norm of its own
    HEADS = 3  # [T, (H + 2K) * head_dim]
    QUERIES = 4  # [T, H * head_dim]
    ATTENDED = 5  # [T, H * head_dim]
    HIDDEN = 6  # [T, I]
    FOUND = 7  # [T, D], before a norm of its own
    SCORES = 8  # [T, E], of the router
    GATHERED = 9  # [T * num_active, D], a row for each token at each of its experts
    EXPERT_HIDDEN = 10  # [T * num_active, I]
    EXPERT_FOUND = 11  # [T * num_active, D]
    SHARED_FOUND = 12  # [T, D], of the expert that every token goes to
    SHARED_SCORES = 13  # [T, 1], of its gate
    LOGITS = 14  # [T, V], new in each step


@dataclass(frozen=True, slots=True)
class Router:
    """How scores become a choice; `shared`: one more expert, which every token goes to, has a gate."""

    num_experts: int
    num_active: int
    normalised: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations that run without a stop, and, if a choice of experts follows, the router that makes it."""

    operations: Sequence[Operation]
    router: Router | None


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a program is done with rows that nobody asks about: behind the last layer's keys and values.

    Attributes:
        segment: the one that is cut, by its number.
        operation: its first one for the other rows alone.
        read: buffers that these read of what was computed for all rows, beside the stream.
        first_key: where a row's keys and values begin in `Buffer.HEADS`.
    """

    segment: int
    operation: int
    read: tuple[Buffer, ...]
    first_key: int
