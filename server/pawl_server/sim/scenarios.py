"""Workloads by name, each with the replica and the load at which it shows something."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.sim import adversaries, workloads
from pawl_server.sim.cost import CostModel, load_cost
from pawl_server.sim.workloads import Workload

__all__ = ["SCENARIOS", "Scenario", "bundled_cost", "replica_limits"]

_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload, its mean arrivals per second, and the tokens that the replica's KV pool holds."""

    make: Workload
    rate: float
    pool_tokens: int


SCENARIOS: Mapping[str, Scenario] = {
    "conversation": Scenario(workloads.conversation, 12.0, 400_000),
    "short-of-blocks": Scenario(workloads.conversation, 12.0, 40_000),
    "bursts": Scenario(workloads.bursts, 8.0, 64_000),
    "on-off": Scenario(workloads.on_off, 5.0, 64_000),
    "system-prompts": Scenario(workloads.system_prompts, 14.0, 64_000),
    "several-samples": Scenario(workloads.several_samples, 14.0, 64_000),
    "multi-turn": Scenario(workloads.multi_turn, 14.0, 200_000),
    "agents": Scenario(workloads.agents, 20.0, 200_000),
    "classes": Scenario(adversaries.classes, 14.0, 64_000),
    "urgent": Scenario(adversaries.urgent, 14.0, 64_000),
    "flood": Scenario(adversaries.flood, 9.0, 64_000),
    "long-prompts": Scenario(adversaries.long_prompts, 8.0, 160_000),
    "prefix-burst": Scenario(adversaries.prefix_burst, 8.0, 64_000),
    "large-heads": Scenario(adversaries.large_heads, 7.0, 64_000),
    "liars": Scenario(adversaries.liars, 14.0, 40_000),
    "abort-storm": Scenario(adversaries.abort_storm, 14.0, 64_000),
    "worker-kills": Scenario(adversaries.worker_kills, 8.0, 64_000),
}


def replica_limits(pool_tokens: int, changes: Sequence[str] = ()) -> SchedulerLimits:
    """The replica that scenarios run on: 256 rows, 2,048 tokens a step, blocks of 64 tokens, 131,072 of context.

    Args:
        pool_tokens: that its KV pool holds.
        changes: `NAME=VALUE` of other limits, a field of `SchedulerLimits` each.

    Raises:
        ValueError: there is no such limit, or it cannot have that value.
    """
    limits = SchedulerLimits(
        num_blocks=pool_tokens // _BLOCK_SIZE,
        block_size=_BLOCK_SIZE,
        max_running=256,
        max_batch_tokens=2048,
        max_context=131_072,
        max_prefill_chunk=512,
        max_waiting=1_000_000,
    )
    return msgspec.convert(msgspec.to_builtins(limits) | dict(map(_change, changes)), SchedulerLimits, strict=False)


def _change(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    names = sorted(field.name for field in dataclasses.fields(SchedulerLimits))
    if not separator or name not in names:
        raise ValueError(f"set = {text!r}: must be NAME=VALUE with one of {', '.join(names)}")
    return name, value


def bundled_cost(name: str) -> CostModel:
    """A cost model that comes with pawl, by the name of its file without `.json`.

    Raises:
        ValueError: there is none of this name.
    """
    folder = importlib.resources.files("pawl_server.sim") / "costs"
    names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    if name not in names:
        raise ValueError(f"cost = {name!r}: neither a file nor one of {', '.join(names)}")
    with importlib.resources.as_file(folder / f"{name}.json") as path:
        return load_cost(Path(path))
