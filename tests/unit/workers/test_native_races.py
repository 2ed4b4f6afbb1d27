"""The threads of the compiled kernels under ThreadSanitizer: nobody reads what another still writes.

Slow: the kernels are built anew, and what they do takes many times as long. The kernels say themselves in which order
threads may touch what: an operation begins when the one before it is done, shares are taken from counters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes.checkpoints import make_llama
from tests.fakes.families import Draft, write_checkpoint
from tests.fakes.sanitizers import OPENMP_FLAGS, build_watched, find_runtime, run_watched

RACE = 66  # exit code of a process in which one was seen
OPTIONS = {"TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:halt_on_error=1:exitcode={RACE}"}
FIXED = ("setarch", "-R")  # its memory lies where it is looked for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The library that comes first in a process that is watched."""
    return find_runtime("libtsan.so", FIXED)


@pytest.fixture(scope="module", params=["avx2", "amx"])
def library(request: pytest.FixtureRequest, sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of at most that level, built to be watched."""
    del sanitizer
    flags = f"-g1 -fsanitize=thread -Wno-tsan {OPENMP_FLAGS}"
    return build_watched(tmp_path_factory.mktemp("kernels"), str(request.param), "-O1", flags)


def _serve(sanitizer: str, library: Path, checkpoint: Path, kv_dtype: str, **variables: str) -> tuple[int, str]:
    arguments = ("-m", "tests.fakes.watched_worker", str(library), str(checkpoint), kv_dtype)
    done = run_watched(sanitizer, OPTIONS | variables, *arguments, before=FIXED)
    return done.returncode, done.stderr


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_threads_do_not_race(sanitizer: str, library: Path, tmp_path: Path, kv_dtype: str) -> None:
    dense = make_llama(tmp_path / "dense", dtype=torch.bfloat16)
    code, errors = _serve(sanitizer, library, dense, kv_dtype)
    assert code == 0, errors


def test_threads_do_not_race_in_routed_layers(sanitizer: str, library: Path, tmp_path: Path) -> None:
    code, errors = _serve(sanitizer, library, _write_routed(tmp_path), "float16")
    assert code == 0, errors


def test_a_wait_that_is_left_out_is_seen(sanitizer: str, library: Path, tmp_path: Path) -> None:
    code, errors = _serve(sanitizer, library, make_llama(tmp_path), "float32", PAWL_TEST_NO_WAITS="1")
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
