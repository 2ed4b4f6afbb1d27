"""A row that fails in the worker fails alone: the others, and whoever gets its blocks, are untouched."""

from __future__ import annotations

from pathlib import Path

import torch

from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.small_plans import plan, sequence
from tests.fakes.worker_driver import WorkerDriver


def test_one_bad_row_fails_alone(llama_folder: Path) -> None:
    """NaN in one sequence's cache fails that row; the others, and whoever gets its blocks, are untouched."""
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=4, max_context=128, num_blocks=8))
    driver = WorkerDriver(worker)
    alone = driver.start([1, 2, 3])
    driver.generate([alone], 40)
    driver.finish(alone)
    bad, good = driver.start([9] * 10), driver.start([1, 2, 3])
    driver.generate([bad, good], 3)
    with torch.inference_mode():
        worker._cache[0].values[bad.blocks[0], :, 4] = torch.nan
    driver.generate([bad, good], 6)
    assert bad.failure == "the hidden state is not finite"
    assert len(bad.output) == 3
    late = driver.step([(bad, 1), (good, 1)])  # a plan made before the failure was known
    assert [failure.row for failure in late.failures] == [bad.row]
    driver.finish(bad)
    driver.generate([good], 40)
    assert good.output == alone.output
    for layer in range(2):
        assert worker._cache[layer].keys.isfinite().all()
        assert worker._cache[layer].values.isfinite().all()
    heir = driver.start([1, 2, 3])
    driver.generate([heir], 40)
    assert heir.output == alone.output


def test_a_draft_that_breaks_the_forward_pass_is_rejected(llama_folder: Path) -> None:
    """A token whose embedding is not a number: drafted it voids the step for its row, chosen it fails the row."""
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=4, max_context=128, num_blocks=8))
    driver = WorkerDriver(worker)
    alone = driver.start([1, 2, 3])
    driver.generate([alone], 40)
    poison = next(token_id for token_id in range(257) if token_id not in {1, 2, 3, *alone.output})
    with torch.inference_mode():
        worker._weights.embedding.tokens[poison] = torch.nan
    one = driver.start([1, 2, 3])
    driver.generate([one], 10)
    result = driver.step([(one, 5)], {one.row: [*alone.output[10:12], poison, alone.output[13]]})
    assert (result.rows, result.failures) == ([], [])
    driver.generate([one], 40)
    assert one.output == alone.output
    chosen = driver.start([1, 2, 3], SamplingSpec(temperature=0.0, logit_bias={poison: 1e9}))
    result = driver.step([(chosen, 4)], {chosen.row: [poison]})
    assert (result.token_ids, result.failures) == ([], [])
    driver.generate([chosen], 3)
    assert chosen.failure == "the hidden state is not finite"
    assert chosen.output == [poison]


def test_drafts_of_a_row_that_failed_are_passed_over(llama_folder: Path) -> None:
    """However many: its plan was made before that was known, and the other rows' part of it stands."""
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=2, max_context=40, num_blocks=4))
    with torch.inference_mode():
        worker._weights.embedding.tokens[200] = torch.nan
    bad = sequence(token_ids=[1, 200, 3], num_prompt_tokens=3)
    worker.execute(plan(new=[bad, sequence(1, block_ids=[2])], rows=[0, 1], num_tokens=[3, 4]))
    result = worker.execute(plan(step=2, new=[], rows=[0, 1], num_tokens=[60, 1], drafts=[(0, [1] * 60)]))
    assert [failure.row for failure in result.failures] == [0]
    assert result.rows == [1]


def test_a_row_with_nothing_to_choose_fails(llama_folder: Path) -> None:
    """Suppressing the whole vocabulary is that row's failure."""
    worker = Worker.load(WorkerOptions(str(llama_folder), max_running=2, num_blocks=4))
    spec = SamplingSpec(temperature=1.0, min_output_tokens=1, suppressed_ids=tuple(range(257)))
    result = worker.execute(
        plan(new=[sequence(sampling=spec), sequence(1, block_ids=[2])], rows=[0, 1], num_tokens=[4, 4])
    )
    assert result.rows == [1]
    assert [(f.row, f.message) for f in result.failures] == [(0, "bias, suppression and mask leave no token to choose")]
