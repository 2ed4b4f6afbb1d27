"""Steps of greedy rows alone take their tokens from the head's screen, and no others do; the tokens are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pawl_workers import worker as worker_module
from pawl_workers.batch import Batch
from pawl_workers.forward import StepOutput, choose
from pawl_workers.kernels.cpu_screen import CpuHead
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.weights import Weights
from pawl_workers.plan import SamplingSpec
from pawl_workers.row_masks import RowMasks
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import FAMILIES, write_checkpoint
from tests.fakes.worker_driver import WorkerDriver

GREEDY = SamplingSpec(temperature=0.0)
OTHERS = {
    "a temperature": SamplingSpec(temperature=0.1, seed=1),
    "log-probabilities": SamplingSpec(temperature=0.0, logprobs=0),
    "a penalty": SamplingSpec(temperature=0.0, repetition_penalty=1.2),
    "a bias": SamplingSpec(temperature=0.0, logit_bias={3: 1.0}),
    "suppression": SamplingSpec(temperature=0.0, min_output_tokens=2, suppressed_ids=(5,)),
}


pytestmark = pytest.mark.usefixtures("without_tiles")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each step that were chosen so, 0 of one that had all its logits computed."""
    counts: list[int] = []

    def counting(batch: Batch, weights: Weights, cache: KvCache) -> StepOutput | None:
        output = choose(batch, weights, cache)
        counts.append(0 if output is None else len(output.sampled.token_ids))
        return output

    monkeypatch.setattr(worker_module, "choose", counting)
    return counts


def _worker(folder: Path, **options: object) -> Worker:
    values: dict[str, object] = {"kernels": "cpu", "max_running": 4, "num_blocks": 60, "max_context": 200}
    return Worker.load(WorkerOptions(str(folder), **(values | options)))  # type: ignore[arg-type]


def _generate(worker: Worker, samplings: list[SamplingSpec], chunk: int = 9) -> list[list[int]]:
    """Prompts of several lengths in chunks, so that some steps sample fewer rows than they compute, then decodes."""
    driver, draw = WorkerDriver(worker), torch.Generator().manual_seed(7)
    driver.reset()
    generations = [
        driver.start(torch.randint(worker.facts.vocab_size, (3 + 11 * i,), generator=draw).tolist(), sampling)
        for i, sampling in enumerate(samplings)
    ]
    driver.generate(generations, 6, chunk=chunk)
    return [generation.output for generation in generations]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("greedy"), dtype=torch.bfloat16)


def test_greedy_rows_have_the_tokens_of_all_logits(folder: Path, chosen: list[int]) -> None:
    with_screen = _generate(_worker(folder), [GREEDY] * 4)
    assert sum(chosen) == 4 * 6
    chosen.clear()
    assert _generate(_worker(folder, screen_head=False), [GREEDY] * 4) == with_screen
    assert _generate(_worker(folder), [OTHERS["log-probabilities"]] * 4) == with_screen
    assert sum(chosen) == 0


@pytest.mark.parametrize("what", OTHERS)
def test_who_wants_more_has_all_logits_computed(folder: Path, chosen: list[int], what: str) -> None:
    alone = _generate(_worker(folder), [GREEDY, GREEDY])
    chosen.clear()
    beside = _generate(_worker(folder), [GREEDY, GREEDY, OTHERS[what]])
    assert beside[:2] == alone
    assert sum(chosen[-5:]) == 0  # decodes of all three


def test_rows_under_a_mask_have_all_logits_computed(folder: Path, chosen: list[int]) -> None:
    worker = _worker(folder)
    driver = WorkerDriver(worker)
    generation = driver.start([1, 2, 3])
    only = np.zeros((1, -(-worker.facts.vocab_size // 32)), dtype=np.uint32)
    only[0, 0] = 1 << 17
    driver.step([(generation, 3)], masks=lambda: RowMasks([generation.row], only))
    assert generation.output == [17]
    driver.step([(generation, 1)])
    assert chosen == [1]  # of the second step alone


def test_drafts_are_verified_by_it(folder: Path, chosen: list[int]) -> None:
    worker = _worker(folder)
    tokens = _generate(worker, [GREEDY])[0]
    driver = WorkerDriver(worker)
    driver.reset()
    prompt = torch.randint(worker.facts.vocab_size, (3,), generator=torch.Generator().manual_seed(7)).tolist()
    generation = driver.start(prompt)
    driver.step([(generation, 3)])
    chosen.clear()
    drafts = [*tokens[1:3], (tokens[3] + 1) % worker.facts.vocab_size]
    driver.step([(generation, 4)], drafts={generation.row: drafts})
    assert generation.output == tokens[:4]
    assert chosen == [4]


def test_a_batch_moved_on_is_entered_again_after_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run over a batch leaves it entered; what runs in between, over the same batch too, makes room for itself."""
    batches: list[Batch] = []

    def keeping(batch: Batch, weights: Weights, cache: KvCache) -> StepOutput | None:
        batches.append(batch)
        return choose(batch, weights, cache)

    monkeypatch.setattr(worker_module, "choose", keeping)
    worker = _worker(folder)
    driver = WorkerDriver(worker)
    generation = driver.start([3, 1, 4])
    driver.step([(generation, 3)])
    for _ in range(2):
        driver.step([(generation, 1)])
    scoring, batch = worker._cache.scoring, batches[-1]
    assert batch is batches[-2]
    assert scoring is not None
    with torch.inference_mode():
        scoring.run_through_head(batch)
        for token_id in (7, 8):
            batch.token_ids[0] = token_id
            stream, token_ids = (found.copy() for found in map(np.asarray, scoring.run_through_choice(batch)))
            anew = scoring.run_through_choice(replace(batch))
            assert (stream == np.asarray(anew[0])).all()
            assert (token_ids == anew[1]).all()
            scoring.run_through_head(batch)
            scoring.run_through_choice(batch)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(data=st.data())
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_family_has_the_tokens_of_all_logits(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp(family)
    write_checkpoint(path, data.draw(FAMILIES[family]))
    worker = _worker(path, max_context=None)
    scoring, head = worker._cache.scoring, worker._weights.head
    if scoring is not None:
        plain = head.divisor == 1.0 and head.softcap is None
        assert scoring.chooses == (plain and isinstance(head.linear, CpuHead))
    assert _generate(worker, [GREEDY] * 3) == _generate(
        _worker(path, max_context=None, screen_head=False), [GREEDY] * 3
    )
