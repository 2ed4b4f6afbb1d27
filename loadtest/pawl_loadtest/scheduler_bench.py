"""`python -m pawl_loadtest.scheduler_bench`: what the scheduler costs a step, without a model.

Fills the scheduler with sequences that decode, answers each plan with a token per row, and times plan, wire form,
launch and commit of the steps in which everybody decodes. Block boundaries are staggered by the lengths of the
prompts, so blocks are taken and prefixes published as in service. Cases are run in turn, several rounds; a line gives
the median of all steps, the spread of the rounds' medians, and the 99th percentile. Run it on an idle machine.

With `--budget` every case is run a second time in each round with a target time between tokens, so that each step is
measured and the model of the step's time is fitted anew; two columns give that median and how many times as long it is.

With `--peer-python PATH`, an interpreter that has vLLM, its scheduler is driven on the same prompts in the same run, in
turn with ours; the last columns give its median, and how many times as long it takes, round by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pawl_loadtest import scheduler_bench_vllm
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_workers.plan import SamplingSpec, StepPlan, StepResult

__all__ = ["CASES", "Case", "Outcome", "Peer", "Trace", "decode_steps", "main"]

BLOCK_SIZE = 16
_EOS = 2
_TOKEN = 7  # what the stub samples: never the end
_STEP_S = 0.02  # that a step is said to take


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences that run, and sequences that wait behind them."""

    running: int
    waiting: int


CASES = (Case(64, 0), Case(256, 0), Case(1024, 0), Case(256, 1_000), Case(256, 100_000))
_MOST_WAITING_AT_PEER = 1_000  # it takes minutes to queue more
GOALS_US = {64: 150, 256: 300, 1024: 1000}


@dataclass(frozen=True, slots=True)
class Trace:
    """Prompts of a case: lengths spread over two blocks, random tokens, the same for everybody who is measured."""

    case: Case
    seed: int = 1

    def prompts(self) -> Iterator[list[int]]:
        """One prompt for each sequence."""
        draw = random.Random(self.seed)  # noqa: S311 (a seeded trace, not a secret)
        for _ in range(self.case.running + self.case.waiting):
            yield [draw.randrange(1000) for _ in range(draw.randint(BLOCK_SIZE, 3 * BLOCK_SIZE))]


@dataclass(slots=True)
class _Stub:
    """A worker without a model: a token for each row that has reached its end."""

    behind: dict[int, int] = field(default_factory=dict)  # tokens not computed, by row

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            self.behind[new.row] = len(new.token_ids) - new.num_computed
        rows = []
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            self.behind[row] -= count
            if not self.behind[row]:
                self.behind[row] = 1
                rows.append(row)
        return StepResult(plan.step, plan.epoch, rows, [_TOKEN] * len(rows), [], [], [], 0.0, 0.0, 0.0)


def _limits(case: Case, num_steps: int) -> SchedulerLimits:
    most_tokens = 4 * BLOCK_SIZE + num_steps
    return SchedulerLimits(
        num_blocks=case.running * (most_tokens // BLOCK_SIZE + 2) + 64, block_size=BLOCK_SIZE,
        max_running=case.running, max_batch_tokens=case.running + 4096, max_context=2 * most_tokens,
        max_prefill_chunk=512, max_partial_prefills=case.running, max_waiting=case.running + case.waiting,
        output_quantile=0.0,
    )  # fmt: skip


def decode_steps(trace: Trace, num_steps: int, budget: StepBudget | None = None) -> list[float]:
    """Seconds of plan, wire form, launch and commit of each step in which everybody decodes.

    Args:
        trace: what runs and waits.
        num_steps: such steps.
        budget: that is asked and learns in every step; its time counts, too.

    Raises:
        RuntimeError: a sequence is refused, or not everybody gets to run.
    """
    case = trace.case
    limits = _limits(case, num_steps)
    state = SchedulerState(limits, CacheRoot("bench", "float32", BLOCK_SIZE))
    for number, prompt in enumerate(trace.prompts()):
        request = SequenceRequest(
            handle=(1, number), request_id=str(number), prompt_ids=prompt, sampling=SamplingSpec(),
            max_output_tokens=limits.max_context // 2, cache_key=b"bench", eos_token_ids=frozenset({_EOS}),
        )  # fmt: skip
        refusal = state.submit(request, 0.0)
        if refusal is not None:
            raise RuntimeError(refusal.message)
    stub = _Stub()
    seconds: list[float] = []
    gc.collect()
    gc.freeze()
    try:
        while len(seconds) < num_steps:
            begin = time.perf_counter()
            plan = plan_step(state, limits, 0.0, budget)
            if plan is None:
                raise RuntimeError(f"nothing to plan with {len(state.running)} of {case.running} running")
            wire = plan.wire()
            launch(state, plan)
            launched = time.perf_counter()
            result = stub.execute(wire)
            answered = time.perf_counter()
            commit(state, plan, result, 0.0)
            if budget is not None:
                budget.observe(plan.load, _STEP_S)
            end = time.perf_counter()
            if plan.num_decodes == case.running:
                seconds.append(end - answered + launched - begin)
    finally:
        gc.unfreeze()
    return seconds


class Peer:
    """vLLM's scheduler in a process of its own.

    Args:
        python: an interpreter that has vLLM.
    """

    def __init__(self, python: Path) -> None:
        self._python = python
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, scheduler_bench_vllm.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip

    def decode_steps(self, trace: Trace, num_steps: int) -> list[float]:
        """As the function of this name, for the peer.

        Raises:
            RuntimeError: the peer died.
        """
        limits = _limits(trace.case, num_steps)
        work: scheduler_bench_vllm.Work = {
            "running": trace.case.running, "block_size": BLOCK_SIZE, "num_blocks": limits.num_blocks,
            "max_batch_tokens": limits.max_batch_tokens, "max_context": limits.max_context,
            "max_output_tokens": limits.max_context // 2, "num_steps": num_steps, "token_id": _TOKEN,
            "prompts": list(trace.prompts()),
        }  # fmt: skip
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the peer has no pipes")
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the peer ended with {self._process.wait()}: {self._python} {scheduler_bench_vllm.__file__}"
            )
        seconds: list[float] = json.loads(line)["seconds"]
        return seconds

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.wait()


@dataclass(slots=True)
class Outcome:
    """Steps of one case, by round, in microseconds."""

    case: Case
    rounds: list[list[float]] = field(default_factory=list)
    peer_rounds: list[list[float]] = field(default_factory=list)
    budget_rounds: list[list[float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Over all steps."""
        return statistics.median(step for steps in self.rounds for step in steps)

    def line(self) -> str:
        """One row of the table."""
        medians = [statistics.median(steps) for steps in self.rounds]
        every = sorted(step for steps in self.rounds for step in steps)
        goal = GOALS_US[self.case.running]
        line = (
            f"{self.case.running:>8}{self.case.waiting:>9}{self.median:>10.0f}"
            f"{f'{min(medians):.0f}-{max(medians):.0f}':>14}{every[int(0.99 * len(every))]:>8.0f}{goal:>7}"
        )
        for others in (self.budget_rounds, self.peer_rounds):
            if others:
                pairs = zip(others, self.rounds, strict=False)
                ratios = [statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                line += f"{statistics.median(step for steps in others for step in steps):>10.0f}{spread:>20}"
        return line

    def measure(self, peer: Peer | None, num_steps: int, *, with_budget: bool = False) -> None:
        """One round: ours, ours with a budget and the peer's, in alternating order."""
        trace = Trace(self.case)
        runs: list[tuple[list[list[float]], Callable[[], list[float]]]] = [
            (self.rounds, lambda: decode_steps(trace, num_steps))
        ]
        if with_budget:
            runs.append((self.budget_rounds, lambda: decode_steps(trace, num_steps, StepBudget(2 * _STEP_S))))
        if peer is not None and self.case.waiting <= _MOST_WAITING_AT_PEER:
            runs.append((self.peer_rounds, lambda: peer.decode_steps(trace, num_steps)))
        for rounds, run in runs if len(self.rounds) % 2 == 0 else runs[::-1]:
            rounds.append([1e6 * step for step in run()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 when a median misses its goal."""
    parser = argparse.ArgumentParser("python -m pawl_loadtest.scheduler_bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="measured steps of a round")
    parser.add_argument("--running", type=int, nargs="*", help="only the cases with so many running")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has vLLM: compare with its scheduler")
    parser.add_argument("--budget", action="store_true", help="also with a target time between tokens")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.running or case.running in options.running]
    outcomes = [Outcome(case) for case in cases]
    peer = Peer(options.peer_python) if options.peer_python else None
    try:
        for _ in range(options.rounds):
            for outcome in outcomes:
                outcome.measure(peer, options.steps, with_budget=options.budget)
    finally:
        if peer is not None:
            peer.close()
    sys.stdout.write(
        f"a decode step without a model, {options.rounds} rounds of {options.steps} steps, microseconds\n"
        f"{'running':>8}{'waiting':>9}{'median':>10}{'of rounds':>14}{'p99':>8}{'goal':>7}"
        + (f"{'budget':>10}{'times without':>20}" if options.budget else "")
        + (f"{'vLLM':>10}{'times ours':>20}\n" if peer else "\n")
    )
    sys.stdout.write("".join(outcome.line() + "\n" for outcome in outcomes))
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n", encoding="utf-8")
    return 0 if all(outcome.median <= GOALS_US[outcome.case.running] for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
