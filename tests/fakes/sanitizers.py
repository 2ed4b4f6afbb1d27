"""Kernels that are built for one of the compiler's sanitizers, and processes that are watched by it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pawl_workers.kernels.native import build

__all__ = ["OPENMP_FLAGS", "build_watched", "find_runtime", "run_watched"]

_ROOT = Path(__file__).parents[2]
_COMPILER = """\
#!/bin/bash
exec gcc "${@/#-O3/%s}" %s
"""
_TIMEOUT_S = 170
OPENMP_FLAGS = f"-Wl,-Bsymbolic,--wrap=wait_until_done {_ROOT / 'tests/fakes/openmp_by_pthreads.c'}"
"""Of a library with an OpenMP of its own, by pthreads."""


def find_runtime(name: str, before: Sequence[str] = ()) -> str:
    """The library of a sanitizer that comes first in a process that is watched; skips where it does not run.

    Args:
        name: of its file.
        before: what the command line of such a process begins with.
    """
    programs = ["gcc", *before[:1]]
    if any(shutil.which(program) is None for program in programs):
        pytest.skip(f"needs {' and '.join(programs)}")
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()  # the name alone, if gcc has no such file
    if not Path(path).is_absolute():
        pytest.skip(f"gcc has no {name}")
    if (done := run_watched(path, {}, "-c", "pass", before=before)).returncode != 0:
        pytest.skip(f"{name} does not run here: {done.stderr.strip()[:200]}")
    return path


def build_watched(folder: Path, level: str, optimisation: str, flags: str) -> Path:
    """Build the kernels of at most that level of instructions with gcc and these flags."""
    compiler = folder / "compiler"
    compiler.write_text(_COMPILER % (optimisation, flags))
    compiler.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(compiler))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("PAWL_CPU_INSTRUCTIONS", level)
        patch.setattr(build, "_BUILT", folder)  # a library that the package brings along is not watched
        return build.find_or_build()


def run_watched(
    runtime: str, variables: Mapping[str, str], *arguments: str, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run Python with a sanitizer's library, these variables and arguments."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [*before, sys.executable, *arguments],
        env={**os.environ, "LD_PRELOAD": runtime, "PYTHONPATH": paths, **variables},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
