"""Two steps in flight through the triton kernels, in the interpreter."""

from __future__ import annotations

from pathlib import Path

from pawl_workers.pending import PendingStep
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama

SPECS = (
    SamplingSpec(temperature=0.0), SamplingSpec(seed=4, logprobs=3),
    SamplingSpec(temperature=0.8, top_k=40, top_p=0.9, seed=7, presence_penalty=0.5, logit_bias={3: 2.0}),
)  # fmt: skip


def test_two_steps_in_flight_give_what_one_gives(tmp_path: Path) -> None:
    """The ids of a step become the input of the next without the host: chunks, joins, and every kind of sampling."""
    folder = make_llama(tmp_path, num_hidden_layers=1)
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
