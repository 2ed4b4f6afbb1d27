"""The triton kernels compile for an H100, ahead of time, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_BYTES = 227 << 10  # of an SM, for one block of threads (CUDA programming guide, compute capability 9.0)


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Heads of 80 to 256, strict and not, in 16 bits: within the machine's limits and on its tensor cores."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.compile_for_gpu"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 93
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= 16, kernel  # a loop's counters
        tensor_cores = (kernel["wgmma"], kernel["mma"])
        if kernel["kernel"] == "_attend_tiles" and kernel["variant"] != "8B strict":
            assert tensor_cores == (True, False), kernel
        elif kernel["kernel"] == "_multiply":  # all tiles of 16 bits by one kind of instruction, or bits would differ
            assert tensor_cores == ("float32" not in kernel["variant"], False), kernel
        elif kernel["kernel"] == "_multiply_experts":
            full = kernel["variant"].startswith(("100", "2048")) or "strict" in kernel["variant"]
            assert tensor_cores == (False, False) if "float32" in kernel["variant"] else (full, not full), kernel
        elif kernel["kernel"] in {"_attend_split", "_attend_tiles"}:
            assert tensor_cores == (False, True), kernel
