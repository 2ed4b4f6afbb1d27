"""Logits of every position equal those of transformers, over paged KV, whatever the chunks and the company."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fakes.checkpoints import NAMED, load_reference
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.reference_logits import reference_logits
from tests.fakes.reference_trace import explain_mismatch

TOLERANCE = 1e-4
Checkpoint = Callable[[str], Path]


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def random_chunks(seed: int, length: int) -> list[int]:
    chooser, chunks = random.Random(seed), []
    while length:
        chunks.append(chooser.choice([1, 2, 3, min(length, 31), min(length, 64), length]))
        chunks[-1] = min(chunks[-1], length)
        length -= chunks[-1]
    return chunks


@pytest.mark.parametrize("kernels", ["cpu", "onednn", "reference"])
@pytest.mark.parametrize("name", NAMED)
def test_every_position_equals_transformers(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """A prompt longer than a tile and several blocks, in random chunks."""
    folder = checkpoint(name)
    runner, model = LogitRunner(folder, kernels, max_running=2), load_reference(folder)
    for seed in range(2):
        token_ids = random_tokens(seed, 150 + 7 * seed)
        found = runner.alone(token_ids, random_chunks(seed, len(token_ids)))
        worst = (found - reference_logits(model, token_ids)).abs().max()
        assert worst < TOLERANCE, explain_mismatch(runner, model, token_ids)


@pytest.mark.parametrize("kernels", ["cpu", "onednn", "reference"])
def test_long_contexts_cross_kv_splits(checkpoint: Checkpoint, kernels: str) -> None:
    """More than one KV split of 512 tokens, with a boundary inside a chunk."""
    folder = checkpoint("llama-rope-llama3")
    runner, model = LogitRunner(folder, kernels, max_running=2), load_reference(folder)
    token_ids = random_tokens(3, 1024)
    found = runner.alone(token_ids, [500, 100, 1, 1, 422])
    assert (found - reference_logits(model, token_ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("kernels", ["cpu", "onednn", "reference"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_mixed_batches_equal_transformers(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """Prefill chunks and single tokens of several sequences share steps."""
    folder = checkpoint(name)
    runner, model = LogitRunner(folder, kernels, max_running=6), load_reference(folder)
    chooser = random.Random(11)
    sequences = {row: random_tokens(100 + row, chooser.randint(1, 200)) for row in range(6)}
    for row, token_ids in sequences.items():
        runner.add(row, token_ids)
    remaining = {row: len(token_ids) for row, token_ids in sequences.items()}
    found: dict[int, list[Tensor]] = {row: [] for row in sequences}
    while remaining:
        rows = chooser.sample(sorted(remaining), chooser.randint(1, len(remaining)))
        grants = {row: min(remaining[row], chooser.choice([1, 1, 5, 40])) for row in rows}
        for row, logits in runner.step(grants).items():
            found[row].append(logits)
            remaining[row] -= grants[row]
        remaining = {row: left for row, left in remaining.items() if left}
    for row, token_ids in sequences.items():
        assert (torch.cat(found[row]) - reference_logits(model, token_ids)).abs().max() < TOLERANCE
