"""The simulator against times worked out by hand, and its parts where they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.sim.cost import CostModel
from pawl_server.sim.executor import FakeExecutor, PlanRefusedError
from pawl_server.sim.policies import POLICIES
from pawl_server.sim.record import Gaps
from pawl_server.sim.simulator import Run, simulate
from pawl_server.sim.streams import Segment, prompt_ids
from pawl_server.sim.trace import Fault, SimulatedRequest, Trace
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan

# A millisecond per step and a tenth of one per token: times can be added up in the head.
COST = CostModel(step_s=1e-3, token_s=1e-4, attention_pair_s=0, context_token_s=0, sequence_s=0)
MS = 1_000_000


def replica(num_blocks: int = 64, *, chunk: int = 64, rows: int = 8, max_bypass: int = 8) -> SchedulerLimits:
    return SchedulerLimits(
        num_blocks=num_blocks, block_size=4, max_running=rows, max_batch_tokens=128, max_context=512,
        max_prefill_chunk=chunk, watermark=0.0, max_bypass=max_bypass, output_quantile=0.0,
    )  # fmt: skip


def request(arrival_s: float, prompt: int, output: int, stream: int = 0, priority: int = 0) -> SimulatedRequest:
    return SimulatedRequest(
        arrival_s=arrival_s, prompt=(Segment(stream, prompt),), output_tokens=output, max_output_tokens=60,
        priority=priority,
    )  # fmt: skip


def run(
    requests: list[SimulatedRequest], limits: SchedulerLimits, policy: str = "production", faults: Sequence[Fault] = ()
) -> Run:
    return simulate(Trace("test", requests, faults), limits, COST, POLICIES[policy], keep=True)


def test_one_request_takes_the_time_of_its_steps() -> None:
    """40 tokens in chunks of 16, 16 and 8, then four steps of one token."""
    record = run([request(0.5, 40, 5)], replica(chunk=16)).record
    first_ns = 500 * MS + 3 * MS + 4 * MS
    assert record.first_token_ns.tolist() == [first_ns]
    assert record.ended_ns.tolist() == [first_ns + 4 * 1_100_000]
    assert record.num_steps == 7
    assert record.num_computed == 44


def test_what_arrives_during_a_step_waits_for_its_end() -> None:
    """The first prompt takes 2 ms; what comes after 1 ms starts when it is done."""
    record = run([request(0.0, 10, 1, 1), request(0.001, 10, 1, 2)], replica()).record
    assert record.first_token_ns.tolist() == [2 * MS, 4 * MS]
    assert record.arrived_ns.tolist() == [0, 1 * MS]


def test_the_next_turn_comes_after_the_answer_and_finds_its_prefix() -> None:
    first = request(0.0, 12, 5)
    text = (*first.prompt, Segment(7, 3))
    second = SimulatedRequest(arrival_s=1.0, prompt=text, output_tokens=1, max_output_tokens=100, follows=0)
    record = run([first, second], replica()).record
    assert record.arrived_ns[1] == record.ended_ns[0] + 1000 * MS
    assert record.cached_tokens.tolist() == [0, 12]


def test_a_lost_worker_costs_the_step_and_the_kv_but_no_token() -> None:
    """The worker dies in the middle of the third token's step and is back after 100 ms."""
    record = run([request(0.0, 9, 5)], replica(), faults=[Fault(0.0035, 0.1)]).record
    assert record.reasons == {0: "eos"}
    assert record.num_output.tolist() == [5]
    assert record.longest_gap_ns[0] == 103_500_000 + 2 * MS + 100_000 - 3 * MS
    assert record.num_recomputed == 10


def test_a_head_that_does_not_fit_blocks_only_where_it_should() -> None:
    """A long request runs, the next needs more blocks than are left, the third would fit."""
    requests = [request(0.0, 100, 30, 1), request(0.001, 100, 5, 2), request(0.002, 8, 5, 3)]
    limits = replica(40, chunk=128)
    record = run(requests, limits).record
    assert record.first_token_ns[2] < record.ended_ns[0] < record.first_token_ns[1]
    record = run(requests, limits, "first-come").record
    assert record.ended_ns[0] < record.first_token_ns[1] <= record.first_token_ns[2]


def test_the_last_in_is_the_victim_where_that_is_the_policy() -> None:
    """The newest is of the higher class: production spares it, last-in does not."""
    requests = [request(0.0, 8, 60, 1), request(0.001, 8, 60, 2), request(0.002, 60, 60, 3, priority=1)]
    preempted = {}
    for policy in ("production", "last-in"):
        preempted[policy] = run(requests, replica(40), policy).record.num_preempted.tolist()
    assert preempted["last-in"][2] > 0
    assert preempted["production"][2] == 0
    assert sum(preempted["production"]) > 0


def test_streams_are_apart_and_repeat_themselves() -> None:
    one, other = prompt_ids([Segment(1, 1000)]), prompt_ids([Segment(2, 1000)])
    assert one == prompt_ids([Segment(1, 1000)])
    assert prompt_ids([Segment(1, 10), Segment(2, 5)]) == one[:10] + other[:5]
    assert len(set(one)) > 900
    assert 0 not in one
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 5


@pytest.mark.parametrize(
    "change",
    [{"step": 2}, {"epoch": 2}, {"num_tokens": [5]}, {"num_tokens": [0]}, {"rows": [1]}],
    ids=["wrong step", "wrong epoch", "more than known", "nothing", "unknown row"],
)
def test_the_executor_refuses_what_a_worker_would(change: dict[str, object]) -> None:
    new = NewSequence(0, [1, 2, 3, 4], 4, 0, [1], SamplingSpec(seed=0))
    values: dict[str, object] = {
        "step": 1, "epoch": 1, "freed_rows": [], "new": [new], "append_blocks": [], "rows": [0], "num_tokens": [4],
    }  # fmt: skip
    executor = FakeExecutor([request(0.0, 4, 2)], 2)
    with pytest.raises(PlanRefusedError):
        executor.execute(StepPlan(**{**values, **change}))  # type: ignore[arg-type]


def test_gaps_are_the_percentiles_of_their_values() -> None:
    values = np.random.default_rng(0).lognormal(16, 1, 10_000).astype(np.int64)
    gaps = Gaps()
    gaps.add(values[:5000])
    for value in values[5000:].tolist():
        gaps.add_alike(value, 1)
    for percent in (1, 50, 99):
        assert gaps.percentile_s(percent) * 1e9 == pytest.approx(np.percentile(values, percent), rel=0.02)
