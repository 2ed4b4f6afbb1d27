"""The C structures of `native/*.h`, field by field; `library.load_library` compares their sizes with C's own."""

from __future__ import annotations

import ctypes
from typing import ClassVar

__all__ = [
    "MOST_ROTARIES",
    "NO_WINDOW",
    "AttentionCall",
    "DecodesCall",
    "EmbeddingCall",
    "ExpertsCall",
    "Frame",
    "LinearCall",
    "NormCall",
    "Operation",
    "PlaceCall",
    "Progress",
    "ScreenCall",
]

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_Fields = list[tuple[str, type]]

MOST_ROTARIES = 4
_NUM_BUFFERS = 15
NO_WINDOW = 1 << 62


def _fields(**groups: type) -> _Fields:
    """Fields of one type in a row, named as one argument: `x__y=c_int64` stands for two."""
    return [(name, kind) for names, kind in groups.items() for name in names.split("__")]


class EmbeddingCall(ctypes.Structure):
    """`Embedding` of elementwise.h."""

    _fields_: ClassVar[_Fields] = _fields(vectors__positions=_P, n=_N, format=_I, scale=_F)


class NormCall(ctypes.Structure):
    """`Norm` of elementwise.h."""

    _fields_: ClassVar[_Fields] = _fields(x__weight__bias__y=_P, rows__n=_N, kind__added=_I, epsilon__factor=_F)


class LinearCall(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_: ClassVar[_Fields] = _fields(
        x__weights__scales__bias__y=_P,
        m__k__n__x_stride__y_stride=_N,
        format__activation__gated__added=_I,
        factor=_F,
        shift=_I,
    )


class PlaceCall(ctypes.Structure):
    """`Place` of elementwise.h."""

    _fields_: ClassVar[_Fields] = _fields(
        heads__cosines__sines__query_norm__key_norm__q__keys__values__slots=_P,
        rows__num_heads__num_kv_heads__head_dim__turned__padded=_N,
        wide__format=_I,
        epsilon=_F,
    )


class AttentionCall(ctypes.Structure):
    """`Attention` of attention.h."""

    _fields_: ClassVar[_Fields] = _fields(
        q__out__keys__values__tables__tiles__pairs__partials__sinks=_P,
        num_tiles__num_pairs__table_stride__num_heads__num_kv_heads__head_dim__padded__window=_N,
        scale__softcap=_F,
        format=_I,
    )


class ExpertsCall(ctypes.Structure):
    """`Experts` of experts.h."""

    _fields_: ClassVar[_Fields] = _fields(
        up__down=_P,
        num_experts__num_active__width__inner=_N,
        added__shared=_I,
        factor=_F,
    )


class ScreenCall(ctypes.Structure):
    """`Screen` of screen.h."""

    _fields_: ClassVar[_Fields] = _fields(weights__columns=_P, k__n=_N)


class _Call(ctypes.Union):
    _fields_: ClassVar[list[tuple[str, type[ctypes.Structure]]]] = [
        ("embedding", EmbeddingCall),
        ("norm", NormCall),
        ("linear", LinearCall),
        ("place", PlaceCall),
        ("attention", AttentionCall),
        ("experts", ExpertsCall),
        ("screen", ScreenCall),
    ]


class Operation(ctypes.Structure):
    """`Operation` of program.c: what is called, the buffers it reads and writes, and its angles (-1: none)."""

    _fields_: ClassVar = [("kind", _I), ("source", _I), ("target", _I), ("rotary", _I), ("call", _Call)]


class Progress(ctypes.Structure):
    """`Progress` of progress.h."""

    _fields_: ClassVar = [("next", _N), ("inside", ctypes.c_uint32), ("sleeping", ctypes.c_uint32)]


class Frame(ctypes.Structure):
    """`Frame` of program.c: what changes from step to step."""

    _fields_: ClassVar = [
        ("buffers", _P * _NUM_BUFFERS),
        ("cosines", _P * MOST_ROTARIES),
        ("sines", _P * MOST_ROTARIES),
        *_fields(token_ids__positions=_P),
        *_fields(slots__tables__tiles__pairs__partials__progress__scratch=_P),
        *_fields(chosen__shares__shared_shares__routing__screened__chosen_tokens__seconds=_P),
        ("turned", _N * MOST_ROTARIES),
        *_fields(
            rows__num_tiles__num_pairs__table_stride__scratch_bytes=_N,
        ),
    ]


class DecodesCall(ctypes.Structure):
    """`Decodes` of decodes.h."""

    _fields_: ClassVar = [
        *_fields(rows__known__num_tokens__num_computed__capacity__positions__token_ids=_P),
        *_fields(slots__sampled_at__num_output__tables__tiles=_P),
        ("all_cosines", _P * MOST_ROTARIES),
        ("all_sines", _P * MOST_ROTARIES),
        ("cosines", _P * MOST_ROTARIES),
        ("sines", _P * MOST_ROTARIES),
        ("turned", _N * MOST_ROTARIES),
        *_fields(count__num_tiles__known_stride__table_stride__num_rotaries__moved=_N),
    ]
