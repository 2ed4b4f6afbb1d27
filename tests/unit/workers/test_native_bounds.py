"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer: nothing is read or written out of bounds.

Built without optimisation, for every set of instructions that this processor has: quick to build, and no read that a
compiler would leave out goes unseen.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pawl_workers.kernels.native import build
from tests.fakes.checkpoints import make_llama, make_qwen3_moe
from tests.fakes.sanitizers import build_watched, find_runtime, run_watched
from tests.fakes.watched_kernels import GROUPS

LEVELS = ("portable", "avx2", "avx512", "amx")
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
PLANTED = """\
#include <stdlib.h>
#include <string.h>
static inline int planted(const char *name) {
    const char *wanted = getenv("PAWL_TEST_PLANTED");
    return wanted && strcmp(wanted, name) == 0;
}
"""
OUTSIDE = "ERROR: AddressSanitizer: heap-buffer-overflow"
# By the group of kernels that meets the fault: the source, what stands there, what is planted, and what is reported.
FAULTS = {
    "linears": ("linear.c", "k = l->k,", "k = l->k + planted(),", OUTSIDE),
    "coded": ("linear_coded.c", "at[own] =", "at[own + planted()] =", OUTSIDE),
    "screen": ("screen.c", "fours = fours_in(w->k),", "fours = fours_in(w->k) + planted(),", OUTSIDE),
    "attention": (
        "attention_group.c",
        "dim < step->head_dim; dim++) to",
        "dim < step->head_dim + planted(); dim++) to",
        OUTSIDE,
    ),
    "elementwise": (
        "elementwise.c",
        "i < n; i++) rest += x[i] * x[i]",
        "i < n + planted(); i++) rest += x[i] * x[i]",
        OUTSIDE,
    ),
    "sampling": (
        "best_tokens.c",
        "i < end; i++) {\n            rest",
        "i < end + planted(); i++) {\n            rest",
        OUTSIDE,
    ),
    "shift": ("linear_pack.c", "1 << shift,", "1 << (shift + 40 * planted()),", "runtime error: shift exponent"),
}


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The library that comes first in a process that is watched."""
    return find_runtime("libasan.so")


def _call(sanitizer: str, library: Path, *groups: str, **variables: str) -> tuple[int, str]:
    # Python and torch leave memory behind when they end.
    watched = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"} | variables
    done = run_watched(sanitizer, watched, "-m", "tests.fakes.watched_kernels", str(library), *groups)
    return done.returncode, done.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_stay_in_their_bounds(
    sanitizer: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel by itself, then models, dense and routed: prompts, decodes that follow each other, two threads."""
    flags = []
    for known in LEVELS[: LEVELS.index(level) + 1]:
        monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", known)
        flags.append(build.instruction_flags())
    if flags[-1] in flags[:-1]:
        pytest.skip(f"this processor has no {level}")
    library = build_watched(tmp_path, level, "-O0", FLAGS)
    models = make_llama(tmp_path / "dense", dtype=torch.bfloat16), make_qwen3_moe(tmp_path / "routed")
    code, errors = _call(sanitizer, library, *GROUPS, *map(str, models))
    assert code == 0, errors


@pytest.fixture(scope="module")
def faulty(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels with faults that the environment wakes, one at a time."""
    del sanitizer
    folder = tmp_path_factory.mktemp("faulty")
    sources = folder / "native"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__", "built"))
    for name, (source, sound, fault, _) in FAULTS.items():
        text = (sources / source).read_text(encoding="utf-8")
        assert text.count(sound) == 1, f"{source} has changed: plant the fault {name!r} elsewhere"
        text = text.replace(sound, fault.replace("planted()", f'planted("{name}")'))
        (sources / source).write_text(PLANTED + text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FOLDER", sources)
        return build_watched(folder, LEVELS[0], "-O0", FLAGS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(sanitizer: str, faulty: Path, fault: str) -> None:
    group = fault if fault in GROUPS else "linears"
    code, errors = _call(sanitizer, faulty, group, PAWL_TEST_PLANTED=fault)
    assert code != 0
    assert FAULTS[fault][3] in errors
