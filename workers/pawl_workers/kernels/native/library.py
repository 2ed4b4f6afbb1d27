"""Bindings: each C function with the types of its arguments. Tensors go in as addresses and are kept by the caller."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch  # noqa: F401 - loaded before the library, so that both share one pool of OpenMP threads

from pawl_workers.kernels.native.build import BuildError, find_or_build
from pawl_workers.kernels.native.structures import (
    AttentionCall,
    DecodesCall,
    EmbeddingCall,
    ExpertsCall,
    Frame,
    LinearCall,
    NormCall,
    Operation,
    PlaceCall,
    Progress,
    ScreenCall,
)

__all__ = ["BuildError", "Library", "load_library"]


class _Pointer(Protocol):
    def __call__(self, *arguments: object) -> None: ...


class Function:
    """A C function that answers nothing; what it takes is in the C source. Counts the seconds of its calls."""

    __slots__ = ("_pointer", "seconds")

    def __init__(self, pointer: _Pointer) -> None:
        self._pointer = pointer
        self.seconds = 0.0

    def __call__(self, *arguments: object) -> None:
        """Call it."""
        started = time.perf_counter()
        self._pointer(*arguments)
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Library:
    """The C functions by name; addresses and counts as int, None for no address, structures by `ctypes.byref`."""

    pack: Function
    pack_groups: Function
    pack_coded: Function
    unpack_coded: Function
    count_exponents: Function
    pack_screen: Function
    linear: Function
    attend: Function
    norm: Function
    place: Function
    activate: Function
    run: Function
    move_on: Function
    note: Function
    choose_tokens: Function
    describe_tokens: Function
    panel_width: int
    scratch_bytes: int
    multiplies_coded: bool
    _loaded: ctypes.CDLL

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each function since this was last called, by name."""
        taken = {}
        for name in _ARGUMENTS:
            function: Function = getattr(self, name)
            taken[name], function.seconds = function.seconds, 0.0
        return taken

    def wide_bytes(self, in_features: int) -> int:
        """Memory that one thread needs to widen two panels of a linear layer."""
        return int(self._loaded.pawl_linear_wide_bytes(in_features))

    def program_scratch_bytes(self, widest: int) -> int:
        """Memory that one thread needs to run a program whose widest linear layer has so many inputs."""
        return int(self._loaded.pawl_program_scratch_bytes(widest))

    def routing_bytes(self, tokens: int, num_experts: int, num_active: int) -> int:
        """Memory in which a step's tokens are sorted by expert."""
        return int(self._loaded.pawl_routing_bytes(tokens, num_experts, num_active))

    def screen_weight_bytes(self, out_features: int, in_features: int) -> int:
        """Memory that the bytes of a head's screen take."""
        return int(self._loaded.pawl_screen_weight_bytes(out_features, in_features))

    def screen_columns(self, out_features: int) -> int:
        """Floats that a head's screen holds beside its bytes."""
        return int(self._loaded.pawl_screen_columns(out_features))

    def screened_bytes(self, num_rows: int, in_features: int, out_features: int) -> int:
        """Memory for what a screen finds of so many rows."""
        return int(self._loaded.pawl_screened_bytes(num_rows, in_features, out_features))

    def sampling_scratch_bytes(self, vocab_size: int) -> int:
        """Memory that one thread needs to sample from so many scores."""
        return int(self._loaded.pawl_sampling_scratch_bytes(vocab_size))


_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS: dict[str, list[type[ctypes._SimpleCData]]] = {  # type: ignore[type-arg]
    "pack": [_P, _P, _N, _N, _N, _I, _I],
    "pack_groups": [_P, _P, _P, _N, _N, _I, _I],
    "pack_coded": [_P, _P, _N, _N, _N, _P, _I],
    "unpack_coded": [_P, _P, _N, _N, _I],
    "count_exponents": [_P, _N, _N, _N, _P, _I],
    "pack_screen": [_P, _P, _P, _N, _N, _N, _P, _I],
    "linear": [_P, _P, _I],
    "attend": [_P, _P, _I],
    "norm": [_P, _I],
    "place": [_P, _I],
    "activate": [_P, _P, _N, _N, _I, _I, _I],
    "run": [_P, _N, _P, _I],
    "move_on": [_P],
    "note": [_P, _P],
    "choose_tokens": [_P, _N, _N, _P, _P, _P, _P, _P, _P, _I],
    "describe_tokens": [_P, _N, _N, _P, _P, _P, _N, _P, _P, _P, _P, _P, _I],
}
_COUNTS: dict[str, list[type[ctypes.c_int64]]] = {
    "scratch_bytes": [],
    "panel_width": [],
    "multiplies_coded": [],
    "linear_wide_bytes": [_N],
    "program_scratch_bytes": [_N],
    "sampling_scratch_bytes": [_N],
    "routing_bytes": [_N, _N, _N],
    "screen_weight_bytes": [_N, _N],
    "screen_columns": [_N],
    "screened_bytes": [_N, _N, _N],
}
_STRUCTURES = (
    NormCall,
    LinearCall,
    PlaceCall,
    AttentionCall,
    Operation,
    Frame,
    ExpertsCall,
    DecodesCall,
    Progress,
    ScreenCall,
    EmbeddingCall,
)


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
        functions[name] = Function(function)
    for name, arguments in _COUNTS.items():
        count = getattr(loaded, f"pawl_{name}")  # which the library keeps, and by index it does not
        count.argtypes, count.restype = arguments, _N
    _compare_sizes(loaded)
    return Library(
        **functions,
        panel_width=int(loaded.pawl_panel_width()),
        scratch_bytes=int(loaded.pawl_scratch_bytes()),
        multiplies_coded=bool(loaded.pawl_multiplies_coded()),
        _loaded=loaded,
    )


def _compare_sizes(loaded: ctypes.CDLL) -> None:
    sizes = (_N * len(_STRUCTURES))()
    loaded.pawl_structure_sizes(sizes)
    for structure, size in zip(_STRUCTURES, sizes, strict=True):
        if ctypes.sizeof(structure) != size:
            raise BuildError(f"{structure.__name__} has {ctypes.sizeof(structure)} bytes here and {size} in C")
