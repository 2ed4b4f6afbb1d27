"""Tests that need a CUDA device: `make test-gpu`, which also turns Triton's interpreter off."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """Return the device; a machine without one skips."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("these tests are of compiled kernels: set TRITON_INTERPRET=0, as `make test-gpu` does")
    return torch.device("cuda")
