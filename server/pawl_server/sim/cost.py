"""How long a step takes: a linear model of its shape, fitted to measured steps.

    seconds = step + token * T + attention * (query, key) pairs + context * tokens of KV read + sequence * R

`sequence` holds what grows with the rows of a step on the CPU (scheduling, preparing, sampling). Time is predicted
in whole nanoseconds, so that sums do not depend on their order.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["CostModel", "FitReport", "MeasuredStep", "StepShape", "fit", "load_cost", "save_cost", "shape_of"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        num_tokens: T, of all sequences.
        num_sequences: R.
        attention_pairs: (query, key) pairs: for each new token the tokens up to and including itself.
        context_tokens: tokens whose KV is read, each sequence once.
    """

    num_tokens: int
    num_sequences: int
    attention_pairs: int
    context_tokens: int


def shape_of(tokens: Sequence[int], contexts: Sequence[int]) -> StepShape:
    """Shape of a step in which sequence i computes `tokens[i]` tokens and then holds `contexts[i]`."""
    new, after = np.asarray(tokens, np.int64), np.asarray(contexts, np.int64)
    pairs = new * (after - new) + new * (new + 1) // 2
    return StepShape(int(new.sum()), len(new), int(pairs.sum()), int(after.sum()))


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step that ran: its shape and how long it took."""

    shape: StepShape
    seconds: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """Relative errors |predicted - measured| / measured of the steps that were held out of the fit."""

    num_fitted: int
    num_held_out: int
    mean_error: float
    median_error: float
    p90_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds per unit of each term, never negative.

    `source` says where the figures come from: "measured", or "analytic" when they are worked out from data sheets.
    """

    step_s: float
    token_s: float
    attention_pair_s: float
    context_token_s: float
    sequence_s: float
    machine: str = ""
    model: str = ""
    source: str = "measured"
    fit: FitReport | None = field(default=None)

    def __post_init__(self) -> None:
        if min(self.coefficients) < 0 or max(self.coefficients) <= 0:
            raise ValueError(f"coefficients {self.coefficients}: none may be negative, and not all may be zero")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of the terms above."""
        return (self.step_s, self.token_s, self.attention_pair_s, self.context_token_s, self.sequence_s)

    def seconds(self, shape: StepShape) -> float:
        """Predicted seconds of one step."""
        return (
            self.step_s
            + self.token_s * shape.num_tokens
            + self.attention_pair_s * shape.attention_pairs
            + self.context_token_s * shape.context_tokens
            + self.sequence_s * shape.num_sequences
        )

    def nanoseconds(self, shape: StepShape) -> int:
        """Predicted time of one step, at least 1."""
        return max(1, round(1e9 * self.seconds(shape)))

    def repeated_nanoseconds(self, shape: StepShape, times: int) -> npt.NDArray[np.int64]:
        """Times [times] of decode steps that follow a decode step of this shape, each context one token longer.

        Equal to `nanoseconds` of each of them: the same operations in the same order.
        """
        grown = shape.num_sequences * np.arange(1, times + 1, dtype=np.int64)
        seconds = (
            self.step_s
            + self.token_s * shape.num_tokens
            + self.attention_pair_s * (shape.attention_pairs + grown)
            + self.context_token_s * (shape.context_tokens + grown)
            + self.sequence_s * shape.num_sequences
        )
        return np.maximum(1, np.rint(1e9 * seconds)).astype(np.int64)


def _features(steps: Sequence[MeasuredStep]) -> FloatArray:
    rows = [
        (1, s.shape.num_tokens, s.shape.attention_pairs, s.shape.context_tokens, s.shape.num_sequences) for s in steps
    ]
    return np.asarray(rows, np.float64)


def _non_negative_least_squares(features: FloatArray, values: FloatArray) -> FloatArray:
    """The least-squares solution with no negative entry, exactly: the best of all supports whose own is feasible."""
    scale = np.maximum(np.abs(features).max(axis=0), np.finfo(np.float64).tiny)
    width = features.shape[1]
    best, least = np.zeros(width), float("inf")
    for size in range(1, width + 1):
        for support in itertools.combinations(range(width), size):
            columns = list(support)
            solution = np.linalg.lstsq(features[:, columns] / scale[columns], values, rcond=None)[0]
            if solution.min() < 0:
                continue
            residual = float(np.square(features[:, columns] / scale[columns] @ solution - values).sum())
            if residual < least:
                least, best = residual, np.zeros(width)
                best[columns] = solution / scale[columns]
    return best


def fit(
    steps: Sequence[MeasuredStep], *, machine: str = "", model: str = "", held_out: float = 0.2, seed: int = 0
) -> CostModel:
    """Fit the coefficients by least squares of the relative error, and measure it on steps held out.

    Args:
        steps: at least ten, of different shapes.
        machine: what ran them.
        model: what they computed.
        held_out: share of the steps, drawn by `seed`, that the fit does not see.
        seed: of that draw.

    Raises:
        ValueError: too few steps, or one that took no time.
    """
    if len(steps) < 10:
        raise ValueError(f"{len(steps)} steps: a fit of five coefficients takes at least 10")
    if min(step.seconds for step in steps) <= 0:
        raise ValueError("a step took no time: seconds must be above 0")
    shuffled = list(steps)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 (a split, not a secret)
    num_held = max(1, round(held_out * len(shuffled)))
    held, seen = shuffled[:num_held], shuffled[num_held:]
    seconds = np.asarray([step.seconds for step in seen])
    solution = _non_negative_least_squares(_features(seen) / seconds[:, None], np.ones(len(seen)))
    truth = np.asarray([step.seconds for step in held])
    errors = np.abs(_features(held) @ solution - truth) / truth
    report = FitReport(
        len(seen), len(held), float(errors.mean()), float(np.median(errors)), float(np.quantile(errors, 0.9))
    )
    step_s, token_s, pair_s, context_s, sequence_s = solution.tolist()
    return CostModel(
        step_s=step_s, token_s=token_s, attention_pair_s=pair_s, context_token_s=context_s, sequence_s=sequence_s,
        machine=machine, model=model, fit=report,
    )  # fmt: skip


def save_cost(cost: CostModel, path: Path) -> None:
    """Write a cost model as JSON."""
    path.write_text(json.dumps(asdict(cost), indent=2) + "\n", encoding="utf-8")


def load_cost(path: Path) -> CostModel:
    """Read a cost model written by `save_cost`.

    Raises:
        ValueError: the file is not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        report = values.pop("fit", None)
        return CostModel(**values, fit=FitReport(**report) if report else None)
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a cost model: {error}") from error
