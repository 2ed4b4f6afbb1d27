"""ConfigReader: typed access to `config.json`; a wrong type is an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping

from pawl_workers.errors import CheckpointError
from pawl_workers.model.spec import Activation

__all__ = ["ConfigReader"]


class ConfigReader:
    """Typed access to a `config.json`; a wrong type is an error that names the key."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._values)

    def without(self, key: str) -> ConfigReader:
        """Read as if a key were absent."""
        return ConfigReader({name: value for name, value in self._values.items() if name != key})

    def with_defaults(self, values: Mapping[str, object]) -> ConfigReader:
        """Read as if these were there where nothing else is."""
        return ConfigReader({**values, **self._values})

    def over(self, other: ConfigReader) -> ConfigReader:
        """Read as if what the other holds were there where nothing is."""
        return self.with_defaults(other._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a positive integer; null and absent mean the default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        """Read an integer of at least 0; null and absent mean the default."""
        return 0 if self._values.get(key) == 0 else self.integer(key, default)

    def number(self, key: str, default: float) -> float:
        """Read a number; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def optional_number(self, key: str, absent: float | None = None) -> float | None:
        """Read a number; None when it is null, `absent` when it is not there."""
        return None if self._values.get(key, absent) is None else self.number(key, absent or 0.0)

    def optional_integer(self, key: str, absent: int | None = None) -> int | None:
        """Read a positive integer; None when it is null, `absent` when it is not there."""
        return None if self._values.get(key, absent) is None else self.integer(key, absent)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Read a list of numbers; empty when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int | float) for i in value):
            raise CheckpointError(f"config.json: {key} must be a list of numbers, not {value!r}")
        return tuple(float(i) for i in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of strings; empty when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(not isinstance(i, str) for i in value):
            raise CheckpointError(f"config.json: {key} must be a list of strings, not {value!r}")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        """Read a string; null and absent mean the default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise CheckpointError(f"config.json: {key} must be a string, not {value!r}")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """Read a nested object; None when it is null or absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} must be an object, not {value!r}")
        return ConfigReader(value)

    def activation(self, key: str, default: str) -> Activation:
        """Read an activation by its name in a configuration."""
        name = self.text(key, default)
        known = {
            "silu": Activation.SILU,
            "swish": Activation.SILU,
            "gelu": Activation.GELU,
            "gelu_new": Activation.GELU_TANH,
            "gelu_pytorch_tanh": Activation.GELU_TANH,
            "relu": Activation.RELU,
        }
        if name not in known:
            raise CheckpointError(f"config.json: {key} {name!r} is not supported; known: {', '.join(known)}")
        return known[name]
