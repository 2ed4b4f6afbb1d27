"""The threads of the compiled kernels under ThreadSanitizer: nobody reads what another still writes.

Slow: the kernels are built anew, and what they do takes many times as long. The kernels say themselves in which order
threads may touch what: barriers between operations, shares that are taken from counters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pawl_workers.kernels.native import build
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import Draft, write_checkpoint

ROOT = Path(__file__).parents[3]
OPENMP = ROOT / "tests" / "fakes" / "openmp_by_pthreads.c"
COMPILER = """\
#!/bin/bash
exec gcc "${@/#-O3/-O1}" -g1 -fsanitize=thread -Wl,-Bsymbolic %s
"""
RACE = 66  # exit code of a process in which one was seen
TIMEOUT_S = 170

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The library that comes first in a process that is watched."""
    if shutil.which("gcc") is None or shutil.which("setarch") is None:
        pytest.skip("needs gcc and setarch")
    found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute() or _watched(path, {}, "-c", "pass").returncode != 0:
        pytest.skip("ThreadSanitizer does not run here")
    return path


@pytest.fixture(scope="module", params=["avx2", "amx"])
def library(request: pytest.FixtureRequest, sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of at most that level, built to be watched."""
    del sanitizer
    folder = tmp_path_factory.mktemp("kernels")
    compiler = folder / "compiler"
    compiler.write_text(COMPILER % OPENMP)
    compiler.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(compiler))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("PAWL_CPU_INSTRUCTIONS", str(request.param))
        return build.find_or_build()


def _watched(sanitizer: str, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    options = f"ignore_noninstrumented_modules=1:halt_on_error=1:exitcode={RACE}"
    paths = os.pathsep.join(path for path in sys.path if path)
    watched = {"LD_PRELOAD": sanitizer, "TSAN_OPTIONS": options, "PYTHONPATH": paths}
    return subprocess.run(
        ["setarch", "-R", sys.executable, *arguments],  # its memory lies where it is looked for
        env=os.environ | watched | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _serve(sanitizer: str, library: Path, checkpoint: Path, kv_dtype: str, **variables: str) -> tuple[int, str]:
    done = _watched(sanitizer, variables, "-m", "tests.fakes.watched_worker", str(library), str(checkpoint), kv_dtype)
    return done.returncode, done.stderr


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_threads_do_not_race(sanitizer: str, library: Path, tmp_path: Path, kv_dtype: str) -> None:
    dense = make_llama(tmp_path / "dense", dtype=torch.bfloat16)
    code, errors = _serve(sanitizer, library, dense, kv_dtype)
    assert code == 0, errors


def test_threads_do_not_race_in_routed_layers(sanitizer: str, library: Path, tmp_path: Path) -> None:
    code, errors = _serve(sanitizer, library, _write_routed(tmp_path), "float16")
    assert code == 0, errors


def test_a_barrier_that_is_left_out_is_seen(sanitizer: str, library: Path, tmp_path: Path) -> None:
    code, errors = _serve(sanitizer, library, make_llama(tmp_path), "float32", PAWL_TEST_NO_BARRIERS="1")
    assert code == RACE
    assert "ThreadSanitizer: data race" in errors


def _write_routed(folder: Path) -> Path:
    values: dict[str, object] = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
    }
    write_checkpoint(folder, Draft("Qwen3MoeForCausalLM", "Qwen3MoeConfig", values, torch.bfloat16, 0))
    return folder
