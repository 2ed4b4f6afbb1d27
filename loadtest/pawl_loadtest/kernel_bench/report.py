"""Where time went, for a reader and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence

from pawl_loadtest.kernel_bench.linears import LinearTime
from pawl_loadtest.kernel_bench.split import Phase
from pawl_loadtest.kernel_bench.workloads import Cost, TimedRun
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.report import spread

__all__ = ["as_json", "phase_lines", "run_lines"]


def run_lines(run: TimedRun, cost: Cost) -> list[str]:
    """A workload: how fast it was, whether the parts add up to that, and each phase."""
    rates = [run.workload.counted_tokens / seconds for seconds in run.plain_s]
    head = (
        f"{run.workload.name}: {spread(rates)} {run.workload.unit}, watched {spread(run.watched_s, 3)} s; "
        f"the parts add up to {run.accounted:.0%} of the {statistics.median(run.plain_s):.3f} s without a watch; "
        f"others took up to {run.others:.2f} cores"
    )
    return [head, *(line for phase in run.phases(cost) for line in phase_lines(phase))]


def phase_lines(phase: Phase) -> list[str]:
    """Milliseconds of each part of a step, its share, and how near it is to its own limit."""
    each = 1e3 / phase.num_steps
    lines = [
        f"  {phase.name}: {phase.num_steps} steps of {phase.seconds * each:.2f} ms, {phase.limit_share:.0%} of the "
        f"limit; parts add up to {phase.accounted:.0%}, Python and dispatch are {phase.overhead:.1%}"
    ]
    for name, seconds in phase.parts.items():
        if seconds == 0.0:
            continue
        fraction = f", {phase.of_limit(name):4.0%} of its limit" if name in phase.limits else ""
        lines.append(f"    {name:20} {seconds * each:8.3f} ms, {seconds / phase.seconds:5.1%} of the step{fraction}")
    return lines


def as_json(
    machine: Machine,
    settings: Mapping[str, str],
    cost: Cost,
    linears: Sequence[LinearTime],
    steps: Mapping[str, Phase],
    runs: Sequence[TimedRun],
) -> str:
    """Every figure; seconds are those of all steps of a phase."""
    figures = {
        "settings": dict(settings),
        "machine": {"threads": machine.threads, "peaks": dict(machine.peaks), "read": dict(machine.read)},
        "linears": [
            {name: getattr(time, name) for name in LinearTime.__slots__} | {"limit_share": time.limit_share(cost.can)}
            for time in linears
        ],
        "steps": {name: _figures(phase) for name, phase in steps.items()},
        "workloads": {
            run.workload.name: {
                "plain_s": list(run.plain_s),
                "watched_s": list(run.watched_s),
                "others": run.others,
                "accounted": run.accounted,
                "phases": {phase.name: _figures(phase) for phase in run.phases(cost)},
            }
            for run in runs
        },
    }
    return json.dumps(figures, indent=2) + "\n"


def _figures(phase: Phase) -> dict[str, object]:
    return {
        "num_steps": phase.num_steps,
        "seconds": phase.seconds,
        "parts": dict(phase.parts),
        "waits": dict(phase.waits),
        "limits": dict(phase.limits),
        "limit_share": phase.limit_share,
        "of_limit": {name: phase.of_limit(name) for name in phase.limits if phase.parts[name]},
        "accounted": phase.accounted,
        "overhead": phase.overhead,
    }
