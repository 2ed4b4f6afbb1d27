"""Engines held to fewer instructions than the processor has, all alike: what they do on a processor that has no more.

Each library is told in the way of its own; llama.cpp chooses when it is compiled. OpenVINO holds what oneDNN computes
to it, matrix products among them, and asks the processor itself for the rest, as for norms: there it may use more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CAPS", "Cap", "held_to"]


@dataclass(frozen=True, slots=True)
class Cap:
    """The most that is used.

    Attributes:
        peaks: those of `Machine.peaks` that remain.
        variables: of the environment of every engine.
        environments: the peers' environments that are others, by the usual one's name.
    """

    peaks: frozenset[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    environments: Mapping[str, str] = field(default_factory=dict)


CAPS: Mapping[str, Cap] = {
    "avx2": Cap(
        frozenset({"AVX2"}),
        {
            "PAWL_CPU_INSTRUCTIONS": "avx2",
            "ATEN_CPU_CAPABILITY": "avx2",  # torch, what its compiler writes, and vLLM by its engine here
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",  # of torch, vLLM and OpenVINO
        },
        {"llama.cpp": "llama.cpp-avx2"},
    )
}
"""By name."""


@contextmanager
def held_to(name: str | None, folder: Path) -> Iterator[None]:
    """Meanwhile this process, and those that it starts, use no more than a cap of `CAPS`; None = whatever there is.

    Args:
        name: of the cap.
        folder: for what vLLM compiles, which it would find again under another cap.
    """
    if name is None:
        yield
        return
    variables = {**CAPS[name].variables, "VLLM_CACHE_ROOT": str(folder / f"vllm-cache-{name}")}
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
