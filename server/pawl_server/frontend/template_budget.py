"""What one rendering of a chat template may use: steps, characters, items and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from jinja2.exceptions import SecurityError

__all__ = ["ITEM", "STEP", "Budget"]

STEP = 64  # units of a loop's turn or a call: bounds the number of steps even where the clock stands still
ITEM = 8  # units of an object beside its characters, about a reference's bytes


class Budget:
    """What one rendering may still use.

    Args:
        units: characters and items that may be made, steps included; see `TemplateSandbox`.
        max_seconds: longest time, counted from now.
        clock: monotonic seconds.
    """

    __slots__ = ("_clock", "_end", "_max_seconds", "_remaining", "_units")

    def __init__(self, units: int, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._units = self._remaining = units
        self._max_seconds = max_seconds
        self._clock = clock
        self._end = clock() + max_seconds

    def charge(self, units: int) -> None:
        """Take from what remains.

        Raises:
            SecurityError: too little remains, or the time is over.
        """
        self._remaining -= units
        if self._remaining < 0:
            raise SecurityError(f"the template takes more steps or makes longer values than {self._units} units allow")
        if self._clock() > self._end:
            raise SecurityError(f"rendering took longer than {self._max_seconds:g} s")

    def charge_value(self, value: object, times: int = 1) -> None:
        """Take the size of a value, with all that it contains, once or more often."""
        if isinstance(value, str):
            self.charge((ITEM + len(value)) * times)
        else:
            self.charge(_size(value, self._remaining) * times)


def _size(value: object, limit: int) -> int:
    """Units of a value with all that it contains; counted no further than beyond `limit`."""
    size = 0
    stack = [value]
    while stack and size <= limit:
        item = stack.pop()
        size += ITEM
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 3
        elif isinstance(item, list | tuple | set):
            stack.extend(item)
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
    return size
