"""What one request asks of its output, before and after it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pawl.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["CompiledConstraint", "Constraint", "bad_constraint"]

_MAX_MESSAGE = 400  # characters of the library's own words


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint as it came.

    Attributes:
        kind: field of the public `SamplingParams`: "json_schema", "regex", "grammar" or "choices".
        source: its text; choices as a JSON array.
        min_output_tokens: the end of text is not allowed before so many tokens while anything else is.
    """

    kind: str
    source: str
    min_output_tokens: int = 0

    @property
    def field(self) -> str:
        """Path of the field that held it."""
        return f"sampling.{self.kind}"


@dataclass(frozen=True, slots=True)
class CompiledConstraint:
    """A constraint that the library understood. `prototype` is only ever copied."""

    constraint: Constraint
    prototype: LLMatcher


def bad_constraint(constraint: Constraint, what: str, reason: str = "BAD_CONSTRAINT") -> InvalidRequest:
    """The error of a constraint that cannot be used: what is wrong, cut to a bounded length."""
    text = " ".join(what.split())
    if len(text) > _MAX_MESSAGE:
        text = text[:_MAX_MESSAGE] + "..."
    message = f"{constraint.kind}: {text}"
    return InvalidRequest(message, reason=reason, violations=[FieldViolation(constraint.field, message)])
