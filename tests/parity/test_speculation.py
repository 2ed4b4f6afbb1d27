"""Drafts change when tokens come, never which: tokens and log-probabilities have the bits of the run without them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pawl_workers.plan import SamplingSpec
from pawl_workers.row_masks import RowMasks
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import FAMILIES, MAX_POSITIONS, write_checkpoint
from tests.fakes.worker_driver import Generation, WorkerDriver

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)
NUM_TOKENS = 24
NAMES = ["mistral", "qwen3-moe", "qwen2-moe", "gemma2", "gpt2", "olmo2", "phi", "cohere2", "glm4", "stablelm-parallel"]


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def load(folder: Path, kernels: str = "auto") -> Worker:
    return Worker.load(
        WorkerOptions(str(folder), kernels=kernels, max_running=8, max_context=MAX_POSITIONS, num_blocks=60)
    )


def draw_sampling(chooser: Random, vocab_size: int) -> list[SamplingSpec]:
    """Greedy and sampled, with every adjustment that depends on what was output before."""
    seed = chooser.randrange(1 << 60)
    ids = chooser.sample(range(vocab_size), 6)
    return [
        SamplingSpec(temperature=0.0, logprobs=2),
        SamplingSpec(seed=seed, temperature=0.7, logprobs=1),
        SamplingSpec(
            seed=seed, temperature=0.9, top_k=20, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7,
            logprobs=0,
        ),
        SamplingSpec(
            seed=seed, temperature=1.1, top_p=0.9, min_p=0.01, logit_bias={ids[0]: 4.0, ids[1]: -5.0}, logprobs=0,
            min_output_tokens=12, suppressed_ids=tuple(ids[2:]),
        ),
        SamplingSpec(temperature=0.0, frequency_penalty=1.5, logprobs=0),
    ]  # fmt: skip


def draw_drafts(chooser: Random, one: Generation, expected: Sequence[int], vocab_size: int) -> list[int]:
    """Up to five tokens: those to come, mostly with a wrong one at some place."""
    done = len(one.output)
    drafts = list(expected[done : done + chooser.randint(0, 5)])
    if drafts and chooser.random() < 0.6:
        place = chooser.randrange(len(drafts))
        drafts[place] = (drafts[place] + chooser.randrange(1, vocab_size)) % vocab_size
    return drafts


def mask_after(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.uint32]:
    """What may follow these tokens, a half of all: another one after others, as a grammar has it."""
    num_words = -(-vocab_size // 32)
    return np.random.default_rng([*token_ids]).integers(0, 1 << 32, num_words, dtype=np.uint32)


def masks_of(
    driver: WorkerDriver, grants: Sequence[tuple[Generation, int]], drafts: Mapping[int, Sequence[int]]
) -> RowMasks:
    """For every other of the sequences that sample: a mask for each of its samples, as a grammar gives them."""
    vocab_size = driver.worker.facts.vocab_size
    rows, words = list[int](), [mask_after([], vocab_size)[:0]]
    for one, count in grants:
        drafted = drafts.get(one.row, [])
        if one.masked and one.num_computed + count == len(one.token_ids) + len(drafted):
            rows += [one.row] * (1 + len(drafted))
            words += [mask_after([*one.token_ids, *drafted[:place]], vocab_size) for place in range(1 + len(drafted))]
    return RowMasks(rows, np.concatenate(words).reshape(len(rows), -(-vocab_size // 32)))


def generate(driver: WorkerDriver, ones: Sequence[Generation]) -> None:
    """One token of each in every step."""
    while unfinished := [one for one in ones if len(one.output) < NUM_TOKENS]:
        grants = [(one, len(one.token_ids) - one.num_computed) for one in unfinished]
        driver.step(grants, masks=partial(masks_of, driver, grants, {}))


def speculate(driver: WorkerDriver, ones: Sequence[Generation], expected: Sequence[Sequence[int]], seed: int) -> int:
    """Generate as the plain run did, with drafts, chunks of prompts beside them, and pauses; drafts accepted."""
    chooser, vocab_size = Random(seed), driver.worker.facts.vocab_size
    accepted = 0
    while unfinished := [i for i, one in enumerate(ones) if len(one.output) < NUM_TOKENS]:
        grants, drafts = [], {}
        for i in chooser.sample(unfinished, chooser.randint(1, len(unfinished))):
            one = ones[i]
            count = min(len(one.token_ids) - one.num_computed, chooser.choice([1, 3, 30, 100]))
            if one.num_computed + count == len(one.token_ids) and (
                ids := draw_drafts(chooser, one, expected[i], vocab_size)
            ):
                drafts[one.row] = ids
                count += len(ids)
            grants.append((one, count))
        torch.set_num_threads(chooser.choice([1, 2]))
        result = driver.step(grants, drafts, partial(masks_of, driver, grants, drafts))
        accepted += len(result.rows) - len(set(result.rows))
    return accepted


def check(worker: Worker, seed: int) -> int:
    """Compare runs of five sequences, some of them masked, with and without drafts; drafts accepted."""
    chooser, vocab_size = Random(seed), worker.facts.vocab_size
    prompts = [chooser.choices(range(vocab_size), k=chooser.choice([1, 20, 31, 64, 80])) for _ in range(5)]
    specs = draw_sampling(chooser, vocab_size)
    plain, drafted = WorkerDriver(worker, seed), WorkerDriver(worker, seed + 1)
    plain.reset()
    alone = [plain.start(prompt, spec) for prompt, spec in zip(prompts, specs, strict=True)]
    for one in alone[::2]:
        one.masked = True
    generate(plain, alone)
    expected = [one.output for one in alone]
    drafted.reset()
    found = [drafted.start(prompt, spec) for prompt, spec in zip(prompts, specs, strict=True)]
    for one in found[::2]:
        one.masked = True
    accepted = speculate(drafted, found, expected, seed)
    for one, wanted in zip(found, alone, strict=True):
        assert one.failure is None
        assert one.output[:NUM_TOKENS] == wanted.output
        assert one.logprobs[:NUM_TOKENS] == wanted.logprobs
    return accepted


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=2, phases=BOUNDED)
@given(data=st.data())
def test_tokens_and_log_probabilities_are_those_without_drafts(name: str, data: st.DataObject) -> None:
    """Several families; greedy and sampled, with penalties, bias, minimum lengths and masks; one or two threads."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_checkpoint(folder, data.draw(FAMILIES[name]))
        assert check(load(folder), data.draw(st.integers(0, 1 << 30))) > 0


@pytest.mark.parametrize("kernels", ["cpu", "onednn"])
def test_every_backend_of_a_cpu_verifies_alike(tmp_path: Path, kernels: str) -> None:
    """The compiled program of all layers, and the layers one by one."""
    worker = load(make_llama(tmp_path, max_position_embeddings=MAX_POSITIONS), kernels)
    assert sum(check(worker, seed) for seed in range(4)) > 40
