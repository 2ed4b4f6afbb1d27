"""The production scheduler as the simulator drives it. The only module here that knows its inside.

`plan`, `commit` and the events between steps call the production functions. `repeat` is the shortcut: it applies
decode steps that differ in nothing, and `steps_alike` says how many of those lie ahead. A property test holds the
shortcut to the long way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import Refusal, SchedulerLimits
from pawl_server.scheduler.budget import StepBudget, StepLoad
from pawl_server.scheduler.committer import Committed, commit, launch, void
from pawl_server.scheduler.endings import Ended
from pawl_server.scheduler.plan import Plan
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest, Sibling
from pawl_server.scheduler.state import SchedulerState
from pawl_server.sim.policies import Policy
from pawl_server.sim.streams import EOS_TOKEN_ID, IntArray, prompt_ids
from pawl_server.sim.trace import SimulatedRequest
from pawl_workers.plan import SamplingSpec, StepPlan, StepResult

__all__ = ["SimulatedScheduler", "Step"]

_EOS = frozenset({EOS_TOKEN_ID})


@dataclass(frozen=True, slots=True)
class Step:
    """A launched step, and how the worker is told of it."""

    plan: Plan
    wire: StepPlan


class SimulatedScheduler:
    """A scheduler under a policy. Handles are indices of requests; times are seconds."""

    def __init__(self, limits: SchedulerLimits, policy: Policy) -> None:
        self.limits = policy.limits(limits)
        self.policy = policy
        self._budget = StepBudget(policy.target_gap_s) if policy.target_gap_s > 0 else None
        self.state = SchedulerState(self.limits, CacheRoot("simulated", "bfloat16", limits.block_size))

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self.state.queue)

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return len(self.state.running)

    @property
    def has_free_row(self) -> bool:
        """Whether another sequence could start if it had the blocks."""
        return bool(self.state.free_rows or self.state.rows_to_free)

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return self.state.pool.num_used

    def submit(
        self, index: int, request: SimulatedRequest, now_s: float, samples: Sequence[int] = ()
    ) -> Refusal | None:
        """Hand a request over, with the indices of its further samples, as the engine would."""
        alone = self.policy.one_queue
        return self.state.submit(
            SequenceRequest(
                handle=index,
                request_id=str(index),
                prompt_ids=prompt_ids(request.prompt),
                sampling=SamplingSpec(seed=index),
                max_output_tokens=request.max_output_tokens,
                cache_key=request.tenant.encode(),
                eos_token_ids=_EOS,
                priority=0 if alone else request.priority,
                tenant="" if alone else request.tenant,
                siblings=[Sibling(sample, sample) for sample in samples],
            ),
            now_s,
        )

    def abort(self, index: int, now_s: float) -> Ended | None:
        """End a request; None when it is not live."""
        return self.state.abort(index, "cancelled", now_s)

    def plan(self, now_s: float) -> Step | None:
        """Plan and launch a step; None when nothing can be computed."""
        plan = plan_step(self.state, self.limits, now_s, self._budget)
        if self.policy.newest_victim and plan is not None and plan.victims:
            plan = self._without_victims(now_s)
        if plan is None:
            return None
        wire = plan.wire()
        launch(self.state, plan)
        return Step(plan, wire)

    def commit(self, step: Step, result: StepResult, now_s: float, seconds: float) -> Committed:
        """Settle a step that took so many seconds."""
        committed = commit(self.state, step.plan, result, now_s)
        if self._budget is not None:
            self._budget.observe(step.plan.load, seconds)
        return committed

    def lose_worker(self, step: Step | None, now_s: float) -> int:
        """The worker died, with this step in flight or none; returns the new epoch."""
        if step is not None:
            void(self.state, step.plan)
        self.state.reset_worker(self.state.epoch + 1, now_s)
        return self.state.epoch

    def steps_alike(self, step: Step) -> int:
        """How many more steps would decide just what this one did, which was just committed and ended nobody.

        Such steps decode one token of every running sequence, in blocks that they have; nobody can be admitted,
        because nobody waits or every row is taken. The next block boundary, of any sequence, ends the run.
        """
        plan, state = step.plan, self.state
        if plan.victims or plan.admissions or plan.freed_rows or plan.append_blocks or state.rows_to_free:
            return 0
        if not plan.num_decodes == len(plan.rows) == len(state.running):
            return 0
        if state.num_waiting and (state.free_rows or self.limits.ageing_s > 0):
            return 0
        slots, rows = state.slots, plan.rows
        # The last slot of a block is left to a real step: it publishes the block.
        before_boundary = -slots.computed[rows] % self.limits.block_size
        before_end = slots.stop_at[rows] - slots.length[rows]
        return max(0, int(np.minimum(before_boundary, before_end).min()) - 1)

    def repeat(self, step: Step, tokens: IntArray, ends_ns: IntArray, launched_ns: int) -> None:
        """Apply steps like this one.

        Args:
            step: the one before.
            tokens: [steps, rows], in the order of its rows.
            ends_ns: when each step ends, [steps].
            launched_ns: when the first of them is launched.
        """
        times, rows = len(tokens), step.plan.rows
        slots, accounts = self.state.slots, self.state.accounts
        self.state.step += times
        for column in (slots.expected, slots.computed, slots.planned):
            column[rows] += times
        for token_ids in tokens:  # one by one: windows fill up, and sums of floats depend on their order
            slots.append(rows, token_ids)
            accounts.charge_output(slots.tenant[rows])
        slots.last_token_at[rows] = int(ends_ns[-1]) / 1e9
        launches_ns = [launched_ns, *ends_ns[:-1].tolist()]
        self.state.pool.advance(launches_ns[-1] / 1e9)
        if self._budget is not None:
            num_read = step.plan.num_read
            for begin_ns, end_ns in zip(launches_ns, ends_ns.tolist(), strict=True):
                num_read += len(rows)
                self._budget.observe(StepLoad(len(rows), num_read, num_read), (end_ns - begin_ns) / 1e9)

    def _without_victims(self, now_s: float) -> Plan | None:
        """Preempt the newest until a plan needs no victim; as in production, nobody is admitted in such a step."""
        nobody_enters = dataclasses.replace(self.limits, watermark=1.0)
        while True:
            plan = plan_step(self.state, nobody_enters, now_s)
            if plan is None or not plan.victims or len(self.state.running) < 2:
                return plan
            newest = self.state.running[max(self.state.running)]
            newest.preemptions += 1
            self.state.lengths.raise_quantile(now_s)
            self.state.give_up_kept(newest)
            self.state.pool.release(newest.blocks)
            self.state.rows_to_free.append(newest.row)
            self.state.requeue(newest, now_s)
