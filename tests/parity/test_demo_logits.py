"""The embedded model: logits and greedy tokens equal those of transformers."""

from __future__ import annotations

import random

import pytest
import torch

from pawl_workers.model.source import DEMO_MODEL, resolve_checkpoint
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import load_reference
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.worker_driver import WorkerDriver

FOLDER = resolve_checkpoint(DEMO_MODEL)

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="the embedded model is not in this tree"
)


@pytest.mark.parametrize("kernels", ["cpu", "onednn", "reference"])
def test_demo_logits_equal_transformers(kernels: str) -> None:
    """Every position of a prompt with two KV splits, in chunks."""
    runner, model = LogitRunner(FOLDER, kernels, max_running=1), load_reference(FOLDER)
    token_ids = random.Random(1).choices(range(runner.spec.vocab_size), k=600)
    with torch.no_grad():
        wanted = model(torch.tensor([token_ids])).logits[0]
    assert (runner.alone(token_ids, [333, 1, 266]) - wanted).abs().max() < 1e-4


def test_demo_greedy_equals_transformers() -> None:
    """64 tokens after a prompt, and the self test."""
    worker, model = Worker.load(WorkerOptions(DEMO_MODEL, max_running=2, max_context=512)), load_reference(FOLDER)
    assert worker.self_test().max_difference < 1e-3
    driver = WorkerDriver(worker)
    prompt = random.Random(2).choices(range(worker.facts.vocab_size), k=50)
    generation = driver.start(prompt)
    driver.generate([generation], 64)
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=-1,
            pad_token_id=0,
        )
    assert generation.output == wanted[0, len(prompt) :].tolist()
