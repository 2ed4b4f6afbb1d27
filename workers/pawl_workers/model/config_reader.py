"""ConfigReader: typed access to `config.json`; what cannot be is an error that names the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeGuard

from pawl_workers.errors import CheckpointError
from pawl_workers.model.spec import Activation

__all__ = ["ConfigReader"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
_MOST_PARTS = 10_000  # layers of a model, experts of a layer: no model has a tenth of it


class ConfigReader:
    """Typed access to a `config.json`; a wrong type or a number out of range is an error that names the key.

    Args:
        values: the keys.
        at: names of the sections that they are in, each with a dot.
    """

    def __init__(self, values: Mapping[str, object], at: str = "") -> None:
        self._values = values
        self._at = at

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._values)

    def without(self, key: str) -> ConfigReader:
        """Read as if a key were absent."""
        return ConfigReader({name: value for name, value in self._values.items() if name != key}, self._at)

    def with_defaults(self, values: Mapping[str, object]) -> ConfigReader:
        """Read as if these were there where nothing else is."""
        return ConfigReader({**values, **self._values}, self._at)

    def over(self, other: ConfigReader) -> ConfigReader:
        """Read as if what the other holds were there where nothing is."""
        return self.with_defaults(other._values)

    def error(self, key: str, problem: str) -> CheckpointError:
        """Make an error of a key: where it stands, and what is wrong with it."""
        return CheckpointError(f"config.json: {self._at}{key} {problem}")

    def integer(self, key: str, default: int | None = None, most: int | None = None) -> int:
        """Read a positive integer, `most` at the most; null and absent mean the default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive integer")
        if most is not None and value > most:
            raise self._wrong(key, f"at most {most}")
        return value

    def parts(self, key: str, default: int | None = None) -> int:
        """Read how many layers or experts there are: as many are laid out before a checkpoint is looked at."""
        return self.integer(key, default, most=_MOST_PARTS)

    def count(self, key: str, default: int) -> int:
        """Read an integer of at least 0; null and absent mean the default."""
        return 0 if self._values.get(key) == 0 else self.integer(key, default)

    def number(self, key: str, default: float) -> float:
        """Read a finite number; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not _is_number(value):
            raise self._wrong(key, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Read a number above 0; null and absent mean the default."""
        if self._values.get(key) is None and default is not None:
            return default
        value = self.number(key, 0.0)
        if value <= 0.0:
            raise self._wrong(key, "a number above 0")
        return value

    def optional_positive(self, key: str, absent: float | None = None) -> float | None:
        """Read a number above 0; None when it is null, `absent` when it is not there."""
        return None if self._values.get(key, absent) is None else self.positive(key, absent)

    def optional_integer(self, key: str, absent: int | None = None) -> int | None:
        """Read a positive integer; None when it is null, `absent` when it is not there."""
        return None if self._values.get(key, absent) is None else self.integer(key, absent)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Read a list of finite numbers; empty when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_number(i) for i in value):
            raise self._wrong(key, "a list of numbers")
        return tuple(float(i) for i in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of strings; empty when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(not isinstance(i, str) for i in value):
            raise self._wrong(key, "a list of strings")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def refuse(self, *keys: str) -> None:
        """Refuse what would change the forward pass in a way that is not known here, where a flag says that it does."""
        for key in keys:
            if self.flag(key, False):
                raise self.error(
                    key, "= true is not supported, and as false gives wrong logits; choose another checkpoint"
                )

    def text(self, key: str, default: str) -> str:
        """Read a string; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """Read a nested object; None when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return ConfigReader(value, f"{self._at}{key}.")

    def needed_section(self, key: str) -> ConfigReader:
        """Read a nested object that has to be there."""
        section = self.section(key)
        if section is None:
            raise self._wrong(key, "an object")
        return section

    def activation(self, key: str, default: str) -> Activation:
        """Read an activation by its name in a configuration."""
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.error(key, f"{name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        value = self._values.get(key)
        return self.error(key, f"is missing; must be {wanted}" if value is None else f"must be {wanted}, not {value!r}")


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that a float holds: json also reads NaN, infinities and integers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
