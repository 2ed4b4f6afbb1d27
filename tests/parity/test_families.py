"""Every model family, over drawn configurations: logits, greedy tokens and scores equal those of transformers."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.model import families
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.families import ARCHITECTURES, FAMILIES, Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.reference_logits import LOGIT_TOLERANCE, assert_same_logits, reference_logits
from tests.fakes.reference_trace import explain_mismatch
from tests.fakes.worker_driver import WorkerDriver

LOSS_TOLERANCE = 1e-5  # nats, the mean over a prompt's tokens
TIE = 1e-5  # logits this close are equal to float32, and either token is greedy
NUM_TOKENS = 64

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)  # drafts are small as they are: nothing to shrink for minutes

Prompt = list[int]


@st.composite
def prompts(draw: st.DrawFn, draft: Draft) -> Prompt:
    """Random tokens, longer than a tile of 64 queries, than two blocks and than most windows."""
    return Random(draw(st.integers(0, 1 << 30))).choices(range(draft.vocab_size), k=draw(st.integers(66, 100)))


def kernels_for(folder: Path) -> list[str]:
    """The backends that serve a checkpoint."""
    spec = read_config(folder).spec
    compiled = CpuKernels.supports(AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim))
    return ["reference", "onednn", *(["cpu"] if compiled else [])]


def check_logits(name: str, data: st.DataObject) -> None:
    draft = data.draw(FAMILIES[name])
    token_ids = data.draw(prompts(draft))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids) - 1), max_size=4)))
    chunks = [end - begin for begin, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = write_checkpoint(folder, draft)
        assert_same_logits(model, folder, kernels_for(folder), token_ids, chunks)


def test_every_architecture_is_drawn() -> None:
    """So that the tests over `FAMILIES`, here and elsewhere, leave out none that is served."""
    assert set(families.FAMILIES) == ARCHITECTURES


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8, phases=BOUNDED)
@given(data=st.data())
def test_every_position_equals_transformers(name: str, data: st.DataObject) -> None:
    """All logits of a prompt, in drawn chunks, on every backend."""
    check_logits(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=200, phases=BOUNDED)
@given(data=st.data())
def test_every_position_equals_transformers_at_length(name: str, data: st.DataObject) -> None:
    """The same over many more configurations."""
    check_logits(name, data)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2, phases=BOUNDED)
@given(data=st.data())
def test_greedy_tokens_and_scores_equal_transformers(name: str, data: st.DataObject) -> None:
    """64 tokens, each the best of what transformers computes afresh from all before it, and the prompt's loss."""
    draft = data.draw(FAMILIES[name])
    prompt = data.draw(prompts(draft))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = write_checkpoint(folder, draft)
        with torch.no_grad():
            inputs = torch.tensor([prompt])
            loss = float(model(inputs, labels=inputs, use_cache=False).loss)
        for kernels in kernels_for(folder):
            driver = WorkerDriver(Worker.load(WorkerOptions(str(folder), kernels=kernels, max_running=1)))
            generation = driver.start(prompt, prompt_logprobs=0)
            driver.generate([generation], NUM_TOKENS, chunk=41)
            logits = reference_logits(model, generation.token_ids[:-1])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(generation.output).unsqueeze(1)).squeeze(1)
            assert len(generation.output) == NUM_TOKENS
            explain = partial(explain_mismatch, LogitRunner(folder, kernels, max_running=1), model)
            assert (logits.amax(dim=-1) - chosen).max() <= TIE, explain(generation.token_ids[:-1])
            scored = [entry.logprob for part in generation.prompt for entry in part.positions]
            assert len(scored) == len(prompt) - 1
            assert abs(-sum(scored) / len(scored) - loss) < LOSS_TOLERANCE, explain(prompt)


@settings(max_examples=5, phases=BOUNDED)
@given(data=st.data())
def test_short_contexts_turn_by_the_short_factors(data: st.DataObject) -> None:
    """A server whose context fits the original one serves long-rope models by their short factors, as transformers."""
    draft = data.draw(FAMILIES["phi3-longrope"])
    token_ids = data.draw(prompts(draft))[:48]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = reference_logits(write_checkpoint(folder, draft), token_ids)
        for kernels in kernels_for(folder):
            runner = LogitRunner(folder, kernels, max_running=1, max_context=48)
            assert (runner.alone(token_ids) - wanted).abs().max() < LOGIT_TOLERANCE, kernels
