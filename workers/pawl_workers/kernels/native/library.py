"""Bindings: each C function with the types of its arguments. Tensors go in as addresses and are kept by the caller."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch  # noqa: F401 - loaded before the library, so that both share one pool of OpenMP threads

from pawl_workers.kernels.native.build import BuildError, find_or_build

__all__ = ["BuildError", "Library", "load_library"]


class Function(Protocol):
    """A C function that answers nothing; what it takes is in the C source."""

    def __call__(self, *arguments: float | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Library:
    """The C functions by name; addresses and counts as int, None for no address."""

    pack_float: Function
    pack_short: Function
    linear: Function
    attend: Function
    rms_norm: Function
    turn_and_write: Function
    silu_gate: Function
    choose_tokens: Function
    describe_tokens: Function
    scratch_bytes: int
    sampling_scratch_bytes: Callable[[int], int]


_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS: dict[str, list[type[ctypes._SimpleCData]]] = {  # type: ignore[type-arg]
    "pack_float": [_P, _P, _N, _N, _I],
    "pack_short": [_P, _P, _N, _N, _I],
    "linear": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _I, _I],
    "attend": [_P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _N, _F, _F, _P, _I],
    "rms_norm": [_P, _P, _P, _P, _N, _N, _F, _I],
    "turn_and_write": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _F, _I, _I],
    "silu_gate": [_P, _P, _N, _N, _I],
    "choose_tokens": [_P, _N, _N, _P, _P, _P, _P, _P, _P, _I],
    "describe_tokens": [_P, _N, _N, _P, _P, _P, _N, _P, _P, _P, _P, _P, _I],
}


@cache
def load_library() -> Library:
    """Load the kernels, building them first if need be.

    Raises:
        BuildError: they cannot be built or loaded.
    """
    path = find_or_build()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    functions: dict[str, Function] = {}
    for name, types in _ARGUMENTS.items():
        function = loaded[f"pawl_{name}"]
        function.argtypes, function.restype = types, None
        functions[name] = function
    loaded.pawl_scratch_bytes.restype = ctypes.c_int64
    sampling_scratch_bytes = loaded.pawl_sampling_scratch_bytes
    sampling_scratch_bytes.argtypes, sampling_scratch_bytes.restype = [_N], ctypes.c_int64
    return Library(
        **functions,
        scratch_bytes=int(loaded.pawl_scratch_bytes()),
        sampling_scratch_bytes=sampling_scratch_bytes,
    )
