"""`python -m pawl_loadtest.replay`: the same trace on a real worker in real time and in the simulator, side by side.

Both run the production planner and committer over the same requests and limits; the simulator's steps take what the
cost model says, the worker's what they take. In process on both sides, without gRPC. Run it on an idle machine.

`--record` writes the worker's steps, planning and committing included, for `python -m pawl_server.sim fit`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pawl_loadtest.arguments import positive
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.committer import commit, launch
from pawl_server.scheduler.planner import plan_step
from pawl_server.scheduler.sequence import SequenceRequest
from pawl_server.scheduler.state import SchedulerState
from pawl_server.sim.arrivals import Arrivals
from pawl_server.sim.azure import TraceRow
from pawl_server.sim.cost import load_cost
from pawl_server.sim.lengths import WORKLOADS
from pawl_server.sim.measured import RecordedStep, write_steps
from pawl_server.sim.policies import POLICIES
from pawl_server.sim.scenarios import bundled_cost
from pawl_server.sim.simulator import simulate
from pawl_server.sim.streams import prompt_ids
from pawl_server.sim.trace import Trace
from pawl_server.sim.workloads import chat_requests
from pawl_workers.plan import SamplingSpec
from pawl_workers.worker import Worker, WorkerOptions

__all__ = ["Timeline", "main", "replay"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened to each request, in seconds after the start, and the steps, where they were recorded."""

    arrived_s: FloatArray
    first_token_s: FloatArray
    ended_s: FloatArray
    num_steps: int
    steps: Sequence[RecordedStep] = ()


def replay(worker: Worker, trace: Trace, limits: SchedulerLimits) -> Timeline:
    """Run a trace on a worker as its arrivals come due, as the engine's loop would.

    Raises:
        RuntimeError: a request does not fit the worker.
    """
    requests = trace.requests
    worker.reset(1)
    state = SchedulerState(limits, CacheRoot("replay", "float32", limits.block_size))
    first, ended = np.full(len(requests), -1.0), np.full(len(requests), -1.0)
    steps: list[RecordedStep] = []
    next_request = 0
    vocab_size = worker.facts.vocab_size
    prompts = [[token_id % vocab_size for token_id in prompt_ids(request.prompt)] for request in requests]
    started = time.perf_counter()
    while (ended < 0).any():
        now = time.perf_counter() - started
        while next_request < len(requests) and requests[next_request].arrival_s <= now:
            request = requests[next_request]
            refusal = state.submit(
                SequenceRequest(
                    handle=next_request, request_id=str(next_request), prompt_ids=prompts[next_request],
                    sampling=SamplingSpec(temperature=0.0), max_output_tokens=request.output_tokens, cache_key=b"",
                ),
                now,
            )  # fmt: skip
            if refusal is not None:
                raise RuntimeError(refusal.message)
            next_request += 1
        planned_at = time.perf_counter()
        plan = plan_step(state, limits, now)
        if plan is None:
            time.sleep(max(0.0, min(0.05, requests[next_request].arrival_s - now)))
            continue
        wire = plan.wire()
        launch(state, plan)
        contexts = state.slots.planned[wire.rows].tolist()
        result = worker.execute(wire)
        now = time.perf_counter() - started
        committed = commit(state, plan, result, now)
        seconds = time.perf_counter() - planned_at
        steps.append(RecordedStep(seconds=seconds, tokens=wire.num_tokens, contexts=contexts))
        for handle, index in zip(committed.handles, committed.indices, strict=True):
            if index == 0:
                first[int(str(handle))] = now
        for one in committed.ended:
            ended[int(str(one.handle))] = now
    return Timeline(np.asarray([request.arrival_s for request in requests]), first, ended, len(steps), steps)


def _make_trace(count: int, rate: float, scale: float, max_context: int, seed: int) -> Trace:
    lengths = WORKLOADS["azure-conversation"].scaled(scale, max_context).lengths(seed)
    dues = Arrivals(rate, seed=seed).due_times()
    rows = [TraceRow(next(dues), pair.prompt, pair.output) for pair, _ in zip(lengths, range(count), strict=False)]
    requests = [
        dataclasses.replace(request, max_output_tokens=request.output_tokens) for request in chat_requests(rows)
    ]
    return Trace("replay", requests)


def _rows(real: Timeline, simulated: Timeline) -> list[tuple[str, float, float]]:
    def first(timeline: Timeline, percent: float) -> float:
        return float(np.percentile(timeline.first_token_s - timeline.arrived_s, percent))

    def whole(timeline: Timeline, percent: float) -> float:
        return float(np.percentile(timeline.ended_s - timeline.arrived_s, percent))

    rows = [(f"first token p{p}, s", first(real, p), first(simulated, p)) for p in (50, 99)]
    rows += [(f"whole request p{p}, s", whole(real, p), whole(simulated, p)) for p in (50, 99)]
    rows.append(("last end, s", float(real.ended_s.max()), float(simulated.ended_s.max())))
    rows.append(("steps", real.num_steps, simulated.num_steps))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pawl_loadtest.replay", description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="a folder, a hub id, or demo")
    add("--cost", default="embedded-cpu", help="a cost model: a JSON file, or one that comes with pawl")
    add("--threads", type=positive, default=1)
    add("--requests", type=positive, default=100)
    add("--rate", type=float, default=10.0, help="arrivals per second")
    add("--scale", type=float, default=0.25, help="factor on the lengths of the conversation trace")
    add("--max-context", type=positive, default=2048)
    add("--seed", type=int, default=0, help="same seed, same trace")
    add("--record", type=Path, help="write the worker's steps here, as CSV or JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and return the exit code."""
    options = _parser().parse_args(arguments)
    cost = load_cost(Path(options.cost)) if options.cost.endswith(".json") else bundled_cost(options.cost)
    worker = Worker.load(
        WorkerOptions(
            model=options.model, num_threads=options.threads, max_running=64, max_batch_tokens=512,
            max_context=options.max_context,
        )
    )  # fmt: skip
    limits = SchedulerLimits(
        num_blocks=worker.facts.num_blocks, block_size=worker.facts.block_size, max_running=64, max_batch_tokens=512,
        max_context=options.max_context,
    )  # fmt: skip
    trace = _make_trace(options.requests, options.rate, options.scale, options.max_context, options.seed)
    real = replay(worker, trace, limits)
    if options.record is not None:
        write_steps(options.record, real.steps)
    run = simulate(trace, limits, cost, POLICIES["production"])
    record = run.record
    simulated = Timeline(
        record.arrived_ns / 1e9, record.first_token_ns / 1e9, record.ended_ns / 1e9, record.num_steps
    )  # fmt: skip
    table = Table("", "worker", "simulated", "ratio", box=None)
    for name, one, other in _rows(real, simulated):
        table.add_row(name, f"{one:.3f}", f"{other:.3f}", f"{other / one:.2f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
