"""Builds the C kernels into a cache, once per source, compiler and instruction set: `python -m ...native.build`.

A plain shared library takes two seconds to build and is tied to no version of torch or Python. An image without a
compiler brings it along, built into the package by `python -m pawl_workers.kernels.native.build --into-package`.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

__all__ = ["BuildError", "find_or_build", "instruction_flags"]

_FOLDER = Path(__file__).parent
_SOURCES = (
    "linear.c",
    "linear_pack.c",
    "linear_coded.c",
    "linear_tiles.c",
    "screen.c",
    "screen_pack.c",
    "attention.c",
    "fetch.c",
    "progress.c",
    "attention_group.c",
    "attention_rows.c",
    "elementwise.c",
    "experts.c",
    "program.c",
    "decodes.c",
    "best_tokens.c",
    "sampling.c",
    "describe.c",
)
_HEADERS = (
    "vector.h",
    "linear.h",
    "linear_tiles.h",
    "screen.h",
    "screen_bytes.h",
    "panels.h",
    "coded.h",
    "tiles.h",
    "sums.h",
    "best_tokens.h",
    "attention.h",
    "fetch.h",
    "ends.h",
    "progress.h",
    "attention_rows.h",
    "attention_tile.h",
    "softmax.h",
    "elementwise.h",
    "experts.h",
)
_BUILT = _FOLDER / "built"
# No -march=native: the machine that builds may not be the one that runs. Products and sums are fused where the source
# says so and nowhere else, so that builds agree. Sums begin at zero in registers: GCC would make the loops that say so
# fill memory first, before every product.
_FLAGS = (
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O3",
    "-fno-tree-loop-distribute-patterns",
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
_X86 = {"x86_64", "AMD64"}
# A line that will be written is asked for as this core's own. Processors that do not know how, do nothing then.
_PREFETCH_TO_WRITE = "-mprfchw"
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", _PREFETCH_TO_WRITE)
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_VNNI_FLAGS = (*_AVX512_FLAGS, "-mavx512vnni")
_AMX_FLAGS = (*_VNNI_FLAGS, "-mamx-tile", "-mamx-bf16")
_LEVELS: Mapping[str, Sequence[tuple[str, ...]]] = {  # of each the fastest first, with the same bits
    "amx": (_AMX_FLAGS,),
    "avx512": (_VNNI_FLAGS, _AVX512_FLAGS),
    "avx2": (_AVX2_FLAGS,),
    "portable": ((),),
}
_LIMIT = "PAWL_CPU_INSTRUCTIONS"
# Linux asks each process to ask before it uses tile registers: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_TIMEOUT_S = 120.0


class BuildError(Exception):
    """The kernels are not built and cannot be."""


def instruction_flags() -> tuple[str, ...]:
    """The compiler's flags for what this processor can do: AMX, AVX-512, AVX2 with FMA and F16C, or nothing.

    The environment variable PAWL_CPU_INSTRUCTIONS (amx, avx512, avx2 or portable) sets the most that is used: for
    replicas on unlike machines that shall compute the same bits, and to compare.

    Raises:
        BuildError: the variable names none of these.
    """
    limit = os.environ.get(_LIMIT) or next(iter(_LEVELS))
    if limit not in _LEVELS:
        raise BuildError(f"{_LIMIT} is {limit!r}; known: {', '.join(_LEVELS)}")
    if platform.machine() not in _X86:
        return ()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    known = {name.replace("_", "") for name in line.split()}
    for level in list(_LEVELS)[list(_LEVELS).index(limit) :]:
        for flags in _LEVELS[level]:
            wanted = {flag.removeprefix("-m").replace("-", "") for flag in flags if flag != _PREFETCH_TO_WRITE}
            if wanted <= known and (level != "amx" or _may_use_tiles()):
                return flags
    return ()


def _may_use_tiles() -> bool:
    """Ask the kernel for tile registers, for this process and its threads."""
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return refused == 0


def find_or_build() -> Path:
    """The library for this machine, from the package, the cache or the compiler.

    Raises:
        BuildError: there is none, and no compiler that makes one.
    """
    flags = instruction_flags()
    packaged = _BUILT / f"{_key('', flags)}.so"
    if packaged.is_file():
        return packaged
    compiler = _compiler()
    try:
        return _find_or_build(compiler, flags)
    except BuildError:
        if flags != _AMX_FLAGS:
            raise
        return _find_or_build(compiler, _VNNI_FLAGS)  # compilers before GCC 11 and Clang 12 know no AMX


def _find_or_build(compiler: str, flags: tuple[str, ...]) -> Path:
    library = _cache_folder() / f"{_key(_version(compiler), flags)}.so"
    if not library.is_file():
        _build(compiler, flags, library)
    return library


def _build_into_package() -> list[Path]:
    """For every processor of this kind: the machine that runs the image may know less than the one that builds it."""
    compiler = _compiler()
    made = []
    for flags in chain(*_LEVELS.values()) if platform.machine() in _X86 else ((),):
        made.append(_BUILT / f"{_key('', flags)}.so")
        _build(compiler, flags, made[-1])
    return made


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise BuildError("there is no C compiler (cc or gcc)")
    return compiler


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (compiler, *_FLAGS, *flags):
        digest.update(part.encode() + b"\0")
    for source in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / source).read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run: {error}") from error
    return done.stdout


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pawl" / "kernels"


def _build(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *_FLAGS, *flags, "-o", str(made), *(str(_FOLDER / name) for name in _SOURCES), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise BuildError(f"{compiler} failed: {lines[0]}")
            made.replace(library)  # at once: another process may build the same
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot build into {library.parent}: {error}") from error


def main() -> None:
    """Build for this machine, and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into-package", action="store_true", help="beside the sources, for images without a compiler")
    try:
        made = _build_into_package() if parser.parse_args().into_package else [find_or_build()]
    except BuildError as error:
        raise SystemExit(str(error)) from error
    sys.stdout.write("".join(f"{library}\n" for library in made))


if __name__ == "__main__":
    main()
