"""Dummy weights: the shapes of the configuration, random, never zero, and as good as any for a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pawl_workers.model.dummy import DUMMY_FILE, dummy_tensor
from pawl_workers.model.headers import StoredTensor
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_gpt2, make_llama


@pytest.mark.parametrize("shape", [(2000, 1500), (7,), (3, 5)])
def test_values_are_random_reproducible_and_never_zero(shape: tuple[int, ...]) -> None:
    stored = StoredTensor(DUMMY_FILE, "x", shape, "BF16", 0)
    made = dummy_tensor(stored, torch.bfloat16, 3)
    assert (tuple(made.shape), made.dtype) == (shape, torch.bfloat16)
    assert bool(made.isfinite().all())
    assert bool((made != 0).all())
    assert torch.equal(made, dummy_tensor(stored, torch.bfloat16, 3))
    assert not torch.equal(made, dummy_tensor(stored, torch.bfloat16, 4))
    assert len(shape) == 1 or len({tuple(row) for row in made.tolist()}) == shape[0]  # no two rows are alike


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_a_folder_without_weights_serves(make: Callable[..., Path], tmp_path: Path) -> None:
    """As many parameters as the real ones, and the self-test holds."""
    options = WorkerOptions(str(make(tmp_path)), max_running=2, max_context=128, num_blocks=8)
    real = Worker.load(options).facts
    (tmp_path / "model.safetensors").unlink()
    worker = Worker.load(dataclasses.replace(options, dummy_weights=True))
    assert worker.facts.num_parameters == real.num_parameters
    assert worker.facts.revision.startswith("dummy:")
    assert worker.facts.revision != real.revision
    assert worker.self_test().max_difference <= 1e-3
