"""Two steps in flight through the triton kernels, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pawl_workers.pending import PendingStep
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama, make_qwen3_moe

POISON = 77
SPECS = (
    SamplingSpec(temperature=0.0), SamplingSpec(seed=4, logprobs=3),
    SamplingSpec(temperature=0.8, top_k=40, top_p=0.9, seed=7, presence_penalty=0.5, logit_bias={3: 2.0}),
)  # fmt: skip


@pytest.mark.parametrize("make", [make_llama, make_qwen3_moe])
def test_two_steps_in_flight_give_what_one_gives(make: Callable[..., Path], tmp_path: Path) -> None:
    """The ids of a step become the input of the next without the host: chunks, joins, and every kind of sampling."""
    folder = make(tmp_path, num_hidden_layers=1)
    found = []
    for depth in (1, 2):
        worker = Worker.load(WorkerOptions(model=str(folder), kernels="triton", max_running=3, num_blocks=8))
        assert worker.facts.max_in_flight == 2
        worker.reset(1)
        news = [NewSequence(row, [9 + row] * 5, 5, 0, [1 + row], spec) for row, spec in enumerate(SPECS)]
        plans = [
            StepPlan(1, 1, [], news[:2], [], [0, 1], [5, 3]),
            StepPlan(2, 1, [], news[2:], [], [0, 1, 2], [1, 2, 5]),
        ]
        plans += [StepPlan(step, 1, [], [], [], [2, 0, 1], [1, 1, 1]) for step in range(3, 8)]
        in_flight: list[PendingStep] = []
        results = []
        for plan in plans:
            in_flight.append(worker.launch(plan))
            assert not in_flight[-1].future.done()
            if len(in_flight) == depth:
                results.append(in_flight.pop(0).result())
        results += [step.result() for step in in_flight]
        found.append([(result.rows, result.token_ids, result.logprobs) for result in results])
    assert found[0] == found[1]
    assert [len(rows) for rows, *_ in found[0]] == [1, 3, 3, 3, 3, 3, 3]


def test_a_block_of_a_row_that_fails_in_flight_hurts_nobody(tmp_path: Path) -> None:
    """Freed while its last step is in flight, and given away at once: extended over and decoded in."""
    folder = make_llama(tmp_path, num_hidden_layers=1)
    worker = Worker.load(WorkerOptions(model=str(folder), kernels="triton", max_running=2, num_blocks=2))
    with torch.inference_mode():
        worker._weights.embedding.tokens[POISON] = torch.nan
    found = []
    for epoch, block in ((1, 2), (2, 1)):  # a block that is clean, and the one of the row that fails
        worker.reset(epoch)
        bad = NewSequence(0, [5, 6, 7, 8, 9, POISON], 6, 0, [1], SPECS[0])
        good = NewSequence(1, [5, 6, 7], 3, 0, [block], SPECS[0])
        steps = [
            worker.launch(StepPlan(1, epoch, [], [bad], [], [0], [6])),
            worker.launch(StepPlan(2, epoch, [0], [good], [], [1], [3])),
        ]
        assert not worker._cache[0].values[1, :, 5].isfinite().any()
        steps.append(worker.launch(StepPlan(3, epoch, [], [], [], [1], [1])))
        results = [step.result() for step in steps]
        assert [failure.row for failure in results[0].failures] == [0]
        found.append([result.token_ids for result in results[1:]])
    assert found[0] == found[1]
    assert [len(token_ids) for token_ids in found[0]] == [1, 1]
