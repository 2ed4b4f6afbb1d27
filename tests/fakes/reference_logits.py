"""Logits of transformers in fp32, and our own held to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.fakes.logit_runner import LogitRunner
from tests.fakes.reference_trace import explain_mismatch

__all__ = ["LOGIT_TOLERANCE", "assert_same_logits", "reference_logits"]

LOGIT_TOLERANCE = 1e-4  # absolute


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Logits of every position, [T, V]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


def assert_same_logits(
    model: PreTrainedModel,
    folder: Path,
    backends: Iterable[str],
    token_ids: list[int],
    chunks: list[int],
    device: torch.device = torch.device("cpu"),  # noqa: B008 - never changed
) -> None:
    """All positions, computed in chunks by each backend from the model's checkpoint; a mismatch names its stage."""
    wanted = reference_logits(model, token_ids)
    # What is flat hides mistakes.
    assert wanted.std(dim=-1).min() > 0.3, "all tokens have the same logits"
    assert wanted.std(dim=0).mean() > 0.1, "all positions have the same logits"
    for kernels in backends:
        runner = LogitRunner(folder, kernels, max_running=1, device=device)
        found = runner.alone(token_ids, chunks).cpu()
        assert (found - wanted).abs().max() < LOGIT_TOLERANCE, explain_mismatch(runner, model, token_ids)
