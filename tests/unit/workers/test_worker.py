"""The worker over plans: results, contract errors, prompt scores and reset."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pawl_workers.errors import PlanError
from pawl_workers.plan import SamplingSpec, StepPlan, decode_plan, decode_result, encode
from pawl_workers.row_masks import RowMasks
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import load_reference, make_llama
from tests.fakes.small_plans import plan, sequence
from tests.fakes.worker_driver import WorkerDriver


@pytest.fixture(scope="module")
def worker(llama_folder: Path) -> Worker:
    """A small worker: 4 rows, contexts of 128, 12 blocks of 32, 4 of them in host memory beside."""
    options = WorkerOptions(
        str(llama_folder), max_running=4, max_context=128, num_blocks=12, host_kv_bytes=4 * 32 * 2 * 2 * 2 * 16 * 4
    )
    return Worker.load(options)


@pytest.fixture
def fresh(worker: Worker) -> Worker:
    """The same, in epoch 0 with nothing in it."""
    worker.reset(0)
    return worker


def test_facts(worker: Worker, llama_folder: Path) -> None:
    """They are those of the checkpoint and the options."""
    facts = worker.facts
    assert facts.architectures == ("LlamaForCausalLM",)
    assert (facts.vocab_size, facts.max_context, facts.eos_token_ids) == (257, 128, (256,))
    assert (facts.block_size, facts.num_blocks, facts.kernels, facts.data_type) == (32, 12, "cpu", "float32")
    assert facts.num_parameters == sum(p.numel() for p in load_reference(llama_folder).parameters())
    assert facts.num_host_blocks == 4
    assert facts.restore_fixed_s + facts.restore_block_s > 0
    assert facts.kv_bytes == 13 * 32 * 2 * 2 * 2 * 16 * 4
    assert facts.revision.startswith("sha256:")


def test_plans_and_results_survive_the_wire(fresh: Worker) -> None:
    """A step through encoded frames."""
    result = fresh.execute(decode_plan(encode(plan())))
    assert decode_result(encode(result)) == result
    assert (result.step, result.epoch, result.rows, len(result.token_ids)) == (1, 0, [0], 1)
    assert (result.logprobs, result.prompt_logprobs, result.failures) == ([], [], [])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (plan(step=2), "step 2 of epoch 0 was sent; the worker is after step 0 of epoch 0"),
        (plan(epoch=1), "of epoch 1 was sent"),
        (plan(rows=[1]), "row 1 is to be computed but holds no sequence"),
        (plan(rows=[4]), r"row 4 is not in \[0, 4\)"),
        (plan(rows=[0, 0], num_tokens=[1, 1]), "distinct"),
        (plan(rows=[0], num_tokens=[]), "1 rows and 0 grants"),
        (plan(num_tokens=[0]), "granted 0 tokens"),
        (plan(num_tokens=[5]), "granted 5 tokens; 0 of its 4 are computed"),
        (plan(freed_rows=[2]), "row 2 is freed but holds no sequence"),
        (plan(append_blocks=[(2, [3])]), "row 2 is given more blocks"),
        (plan(append_blocks=[(0, [3])]), "row 0 is given more blocks"),
        (plan(new=[sequence(), sequence()]), "twice"),
        (plan(new=[sequence(block_ids=[])]), "has 0 blocks of 32 tokens for 4 tokens"),
        (plan(new=[sequence(block_ids=[0])]), r"blocks 0 to 0, not in \[1, 12\]"),
        (plan(new=[sequence(block_ids=[13])]), r"not in \[1, 12\]"),
        (plan(new=[sequence(block_ids=[1, 2, 3, 4, 5])]), "more than 4 blocks"),
        (plan(new=[sequence(token_ids=[257] * 4)]), "outside the vocabulary of 257"),
        (plan(new=[sequence(token_ids=[-1] * 4)]), "outside the vocabulary"),
        (plan(new=[sequence(token_ids=[])]), "has 0 tokens"),
        (plan(new=[sequence(token_ids=[1] * 129, num_prompt_tokens=9)]), "has 129 tokens"),
        (plan(new=[sequence(num_computed=4)]), "4 computed"),
        (plan(new=[sequence(num_prompt_tokens=5)]), "5 of the prompt"),
        (plan(new=[sequence(sampling=SamplingSpec(logit_bias={999: 1.0}))]), "outside the vocabulary"),
        (plan(copies=[(0, 2)]), r"block 0 is copied or swapped, not in \[1, 12\]"),
        (plan(copies=[(2, 13)]), "block 13 is copied"),
        (plan(copies=[(2, 3), (4, 3)]), "written twice"),
        (plan(copies=[(2, 3), (3, 4)]), "a copy reads a block that another copy writes"),
        (plan(swap_out=[(2, 4)]), r"host block 4 is swapped, not in \[0, 4\)"),
        (plan(swap_out=[(2, 0), (3, 0)]), "written twice"),
        (plan(swap_in=[(-1, 2)]), "host block -1 is swapped"),
        (plan(swap_in=[(0, 2)], copies=[(3, 2)]), "written twice"),
        (plan(drafts=[(1, [5])]), "drafts are for distinct rows of the step"),
        (plan(num_tokens=[5], drafts=[(0, [5]), (0, [5])]), "drafts are for distinct rows of the step"),
        (plan(drafts=[(0, [])]), "row 0 has no drafts"),
        (plan(num_tokens=[5], drafts=[(0, [257])]), "outside the vocabulary of 257"),
        (plan(drafts=[(0, [5])]), "row 0 is computed up to 4 tokens, and 5 with its drafts"),
        (plan(new=[sequence(samples=False)], num_tokens=[5], drafts=[(0, [5])]), "drafts but samples nothing"),
        (plan(num_tokens=[33], drafts=[(0, [5] * 29)]), "has 1 blocks of 32 tokens for 33 tokens"),
        (plan(num_tokens=[68], drafts=[(0, [5] * 64)]), "65 positions are to be sampled, at most 64 can be"),
        (plan(num_tokens=[5], drafts=[(0, [5] * 4)]), "computed up to 5 tokens, and 8"),
    ],
)
def test_plans_that_break_the_contract_change_nothing(fresh: Worker, broken: StepPlan, message: str) -> None:
    """Each is refused with its numbers, and the right plan is still accepted afterwards."""
    with pytest.raises(PlanError, match=message):
        fresh.execute(broken)
    assert fresh.execute(plan()).rows == [0]


def test_rows_are_freed_reused_and_empty_steps_are_allowed(fresh: Worker) -> None:
    """Freeing, adding to the same row, and appending blocks as a sequence grows past a block."""
    first = fresh.execute(plan()).token_ids
    again = fresh.execute(plan(step=2, freed_rows=[0], new=[sequence(block_ids=[7])])).token_ids
    assert first == again
    empty = fresh.execute(plan(step=3, freed_rows=[0], new=[], rows=[], num_tokens=[]))
    assert (empty.rows, empty.failures) == ([], [])
    driver = WorkerDriver(fresh)
    driver.reset()
    long = driver.start([5] * 20)
    driver.generate([long], 60)
    assert len(long.blocks) == 3


def test_a_plan_swaps_before_it_computes_and_copies_after(fresh: Worker) -> None:
    """A prefix of two blocks is swapped out, its blocks given to others; then it is swapped in, computed and forked."""
    prompt = [7, 200, 31, 8] * 20
    sequences = {
        "alone": sequence(token_ids=prompt, num_prompt_tokens=80, block_ids=[1, 2, 3]),
        "other": sequence(token_ids=[9] * 80, num_prompt_tokens=80, block_ids=[1, 2, 4]),
        "restored": sequence(token_ids=prompt, num_prompt_tokens=80, num_computed=64, block_ids=[7, 8, 9]),
        "forked": sequence(1, token_ids=prompt, num_prompt_tokens=80, num_computed=72, block_ids=[7, 8, 11]),
    }
    alone = fresh.execute(plan(new=[sequences["alone"]], num_tokens=[80])).token_ids
    fresh.execute(plan(step=2, freed_rows=[0], new=[sequences["other"]], num_tokens=[80], swap_out=[(1, 3), (2, 0)]))
    new, moves = [sequences["restored"], sequences["forked"]], {"swap_in": [(3, 7), (0, 8)], "copies": [(9, 11)]}
    restored = fresh.execute(plan(step=3, freed_rows=[0], new=new, num_tokens=[16], **moves))
    assert restored.rows == [0]
    forked = fresh.execute(plan(step=4, new=[], rows=[1], num_tokens=[8]))
    assert restored.token_ids == forked.token_ids == alone


def test_prompt_scores_and_logprobs_equal_transformers(fresh: Worker, llama_folder: Path) -> None:
    """All prompt positions, over chunks, and the sampled tokens' own."""
    driver = WorkerDriver(fresh)
    driver.reset()
    prompt = [3, 200, 17, 4, 9, 250, 33] * 12
    generation = driver.start(prompt, SamplingSpec(temperature=0.0, logprobs=2), prompt_logprobs=3)
    driver.generate([generation], 3, chunk=19)
    with torch.no_grad():
        logits = load_reference(llama_folder)(torch.tensor([generation.token_ids])).logits[0]
    wanted = logits.log_softmax(-1)
    scored = [entry for part in generation.prompt for entry in part.positions]
    assert [part.first_position for part in generation.prompt] == [1, 20, 39, 58, 77]
    assert [entry.token_id for entry in scored] == prompt[1:]
    sampled = [entry for entry in generation.logprobs if entry is not None]
    assert len(sampled) == 3
    for position, entry in enumerate([*scored, *sampled]):
        row = wanted[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        best = row.topk(len(entry.alternative_ids))
        assert entry.alternative_ids == best.indices.tolist()
        assert entry.alternative_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scores_without_sampling(fresh: Worker) -> None:
    """A row that samples nothing gives its prompt's log-probabilities and no token."""
    new = sequence(prompt_logprobs=0, prompt_logprobs_from=2, samples=False)
    result = fresh.execute(plan(new=[new]))
    assert (result.rows, result.token_ids) == ([], [])
    scored = result.prompt_logprobs[0]
    assert (scored.row, scored.first_position, [p.token_id for p in scored.positions]) == (0, 2, [3, 4])


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e-31, 1e-9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_smallest_repetition_penalties_choose_what_was_seen(
    fresh: Worker, penalty: float, temperature: float
) -> None:
    """Dividing by them must not make a logit infinite: a penalty is any number above 0."""
    driver = WorkerDriver(fresh)
    row = driver.start([5, 6, 7, 8], SamplingSpec(temperature=temperature, repetition_penalty=penalty, seed=3))
    driver.generate([row], 8)
    assert row.failure is None
    assert set(row.output) <= {5, 6, 7, 8}


def test_a_row_with_fewer_masks_than_samples_is_refused(fresh: Worker) -> None:
    """To sample one without is worse than to sample nothing."""
    fresh.execute(plan())
    masks = RowMasks([0], np.full((1, 9), 0xFFFFFFFF, dtype=np.uint32))
    with pytest.raises(PlanError, match="row 0 has 1 masks and more samples"):
        fresh.execute(plan(step=2, new=[], num_tokens=[2], drafts=[(0, [9])]), lambda: masks)


def test_it_says_when_a_step_has_been_prepared(fresh: Worker) -> None:
    """Once for each that computes something, a prompt or a decode step, before its tokens are there; and not before."""
    told: list[int] = []
    steps = [plan(), StepPlan(2, 0, [], [], [], [0], [1]), StepPlan(3, 0, [], [], [], [0], [1])]
    for step in steps:
        fresh.launch(step, began=partial(told.append, step.step)).result()
        assert told == list(range(1, step.step + 1))
    fresh.launch(StepPlan(4, 0, [0], [], [], [], []), began=partial(told.append, 4)).result()
    with pytest.raises(PlanError):
        fresh.launch(StepPlan(5, 0, [], [], [], [0], [1]), began=partial(told.append, 5))
    assert told == [1, 2, 3]


def test_a_context_longer_than_any_memory_is_served_as_far_as_the_cache_goes(tmp_path: Path) -> None:
    """Its rows have room for what the blocks hold and the token after it, not for two thousand million tokens."""
    folder = make_llama(tmp_path, max_position_embeddings=(1 << 31) - 2)
    worker = Worker.load(WorkerOptions(str(folder), num_blocks=3, max_running=2))
    assert worker.facts.max_context == (1 << 31) - 2
    whole = 3 * worker.facts.block_size
    prompt = [index % 250 for index in range(whole)]
    result = worker.execute(
        plan(new=[sequence(token_ids=prompt, num_prompt_tokens=whole, block_ids=[1, 2, 3])], num_tokens=[whole])
    )
    assert (result.rows, len(result.token_ids)) == ([0], 1)
    with pytest.raises(PlanError, match=f"has 3 blocks of {worker.facts.block_size} tokens for {whole + 1} tokens"):
        worker.execute(plan(step=2, new=[], num_tokens=[1]))


def test_reset_forgets(fresh: Worker) -> None:
    """Rows are gone, the count begins again, and the old epoch is refused."""
    fresh.execute(plan())
    fresh.reset(7)
    with pytest.raises(PlanError, match="epoch 0"):
        fresh.execute(plan(step=2, new=[]))
    assert fresh.execute(plan(epoch=7)).rows == [0]
