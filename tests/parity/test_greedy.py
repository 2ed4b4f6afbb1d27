"""Greedy continuations of 64 tokens equal those of transformers, alone and in mixed batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import NAMED, load_reference
from tests.fakes.worker_driver import WorkerDriver

NUM_TOKENS = 64
Checkpoint = Callable[[str], Path]


def load(folder: Path, kernels: str = "auto") -> WorkerDriver:
    options = WorkerOptions(str(folder), kernels=kernels, max_running=8, max_context=512)
    return WorkerDriver(Worker.load(options))


def prompts() -> list[list[int]]:
    chooser = random.Random(5)
    return [chooser.choices(range(256), k=length) for length in (1, 9, 64, 100)]


@pytest.mark.parametrize("kernels", ["cpu", "onednn", "reference"])
@pytest.mark.parametrize("name", NAMED)
def test_greedy_equals_transformers(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    """Four prompts of different lengths in one batch, in chunks of 40."""
    folder = checkpoint(name)
    driver, model = load(folder, kernels), load_reference(folder)
    generations = [driver.start(prompt) for prompt in prompts()]
    driver.generate(generations, NUM_TOKENS, chunk=40)
    for prompt, generation in zip(prompts(), generations, strict=True):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                min_new_tokens=0,
                max_new_tokens=NUM_TOKENS,
                eos_token_id=-1,
                pad_token_id=0,
            )
        assert generation.output == wanted[0, len(prompt) :].tolist()


def test_resumed_sequences_continue_alike(checkpoint: Checkpoint) -> None:
    """A sequence sent again with its output so far, greedy or sampled, goes on with the same tokens."""
    driver = load(checkpoint("llama-gqa"))
    for sampling in (
        SamplingSpec(temperature=0.0),
        SamplingSpec(temperature=0.9, seed=17, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3),
    ):
        prompt = prompts()[2]
        whole = driver.start(prompt, sampling)
        driver.generate([whole], 40)
        resumed = driver.start(prompt, sampling, output=whole.output[:15])
        driver.generate([resumed], 40, chunk=33)
        assert resumed.output == whole.output
        driver.finish(whole)
        driver.finish(resumed)


def test_sampled_tokens_do_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    """Seeded sampling gives the same tokens and log-probabilities alone and beside seven others."""
    driver = load(checkpoint("gpt2"))
    sampling = SamplingSpec(temperature=1.0, seed=3, top_k=50, min_p=0.01, presence_penalty=0.5, logprobs=3)
    prompt = prompts()[1]
    alone = driver.start(prompt, sampling)
    driver.generate([alone], 30)
    driver.finish(alone)
    specs = [SamplingSpec(temperature=0.7 + 0.1 * seed, seed=seed, logprobs=seed - 1) for seed in range(7)]
    others = [driver.start(prompts()[seed % 4], spec) for seed, spec in enumerate(specs)]
    beside = driver.start(prompt, sampling)
    driver.generate([*others[:4], beside, *others[4:]], 30, chunk=5)
    assert beside.output == alone.output
    assert beside.logprobs == alone.logprobs
