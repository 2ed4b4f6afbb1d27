"""What an output must be, checked as far as can be without compiling it: sizes, JSON, and what it excludes."""

from __future__ import annotations

import json

from pawl.v1 import types_pb2
from pawl_server.config import LimitSettings
from pawl_server.frontend.requests import ConstraintChoice
from pawl_server.frontend.violations import Violations

__all__ = ["constraint"]

_EXCLUDES = "the constraint decides where the output ends: drop one of the two"


def constraint(
    found: Violations, message: types_pb2.SamplingParams, stop: types_pb2.StopParams, limits: LimitSettings
) -> ConstraintChoice | None:
    """The constraint of a request; None if it has none. Whether it can be understood is the engine's to say."""
    kind = message.WhichOneof("constraint")
    if kind is None:
        return None
    texts = tuple(message.choices.values) if kind == "choices" else (str(getattr(message, kind)),)
    field = f"sampling.{kind}"
    size, most = sum(len(text.encode()) for text in texts), limits.max_constraint_bytes
    text = f"{size} bytes, at most {most} are allowed (server setting limits.max_constraint_bytes)"
    if found.check(size <= most, field, text):
        if kind == "choices":
            _check_choices(found, texts, limits)
        elif found.check(bool(texts[0].strip()), field, "must not be empty: leave it unset for any output"):
            _check_text(found, field, kind, texts[0])
    for name, given in (
        ("stop_strings", bool(stop.stop_strings)),
        ("stop_token_ids", bool(stop.stop_token_ids)),
        ("ignore_eos", stop.ignore_eos),
    ):
        found.check(not given, f"stop.{name}", f"not together with {field}: {_EXCLUDES}")
    return ConstraintChoice(kind, texts)


def _check_choices(found: Violations, values: tuple[str, ...], limits: LimitSettings) -> None:
    if not found.count("sampling.choices.values", len(values), limits.max_choices, "limits.max_choices", low=1):
        return
    seen: dict[str, int] = {}
    for index, value in enumerate(values):
        field = f"sampling.choices.values[{index}]"
        found.check(bool(value), field, "must not be empty")
        found.check(seen.setdefault(value, index) == index, field, f"is the same as values[{seen[value]}]: drop one")


def _check_text(found: Violations, field: str, kind: str, text: str) -> None:
    found.check("\0" not in text, field, "has a null character: leave it out")
    if kind != "json_schema":
        return
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        found.add(field, f"is not JSON: {str(error)[:200]}")
        return
    found.check(isinstance(schema, dict), field, f"is a JSON {type(schema).__name__}: a JSON Schema is an object")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
