"""Parts the time of steps: what the kernels' own clocks say, what Python's do, and what no clock has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pawl_loadtest.steps import Shape
from pawl_workers.kernels.cpu_seconds import KernelSeconds
from pawl_workers.plan import StepResult

__all__ = ["KERNELS", "PYTHON", "Phase", "WatchedStep", "parts_of", "phases_of"]

KERNELS = ("linears", "attention", "norms, rope, placing", "experts", "head", "sampling", "waits")
"""Parts by the kernels' clocks. Activations and residuals are computed in linear layers, with what they give."""
PYTHON = ("planning", "preparing", "dispatch")
"""Parts by Python's clocks: scheduling and settling the step before; the batch; everything around the kernels."""


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """One step of a run.

    Attributes:
        shape: what it computed.
        seconds: from the end of the step before to its own end.
        planning_s: of these, until the worker was told.
        result: what the worker answered, with its own clocks.
        kernels: what the clocks of its kernels counted.
    """

    shape: Shape
    seconds: float
    planning_s: float
    result: StepResult
    kernels: KernelSeconds


def parts_of(step: WatchedStep) -> dict[str, float]:
    """Seconds of each part. Each is clocked by itself, so that their sum shows what no clock has seen."""
    result, kernels = step.result, step.kernels
    work, waits = kernels.work, kernels.waits
    layers = work.total + waits.total
    return {
        "linears": work.linears,
        "attention": work.attention,
        "norms, rope, placing": work.norms + work.placing,
        "experts": work.routing,
        "head": kernels.head,
        "sampling": kernels.sampling,
        "waits": waits.total,
        "planning": step.planning_s,
        "preparing": result.prepare_s,
        "dispatch": result.forward_s + result.sample_s - layers - kernels.head - kernels.sampling,
    }


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one kind of a run.

    Attributes:
        seconds: of all its steps.
        parts: seconds by part.
        waits: of the waits, those after linear layers and after attention.
        limits: least seconds of linears, attention and head.
    """

    name: str
    num_steps: int
    seconds: float
    parts: Mapping[str, float]
    waits: Mapping[str, float]
    limits: Mapping[str, float]

    @property
    def accounted(self) -> float:
        """The share of the time that the parts add up to."""
        return sum(self.parts.values()) / self.seconds

    @property
    def overhead(self) -> float:
        """The share of Python and of dispatch: of everything but kernels, seen by a clock or not."""
        return 1.0 - sum(self.parts[name] for name in KERNELS) / self.seconds

    @property
    def limit_share(self) -> float:
        """Least seconds over those it took."""
        return sum(self.limits.values()) / self.seconds

    def of_limit(self, part: str) -> float:
        """The same of one part, with the waits after it: its work may be dealt out unevenly."""
        return self.limits[part] / (self.parts[part] + self.waits.get(part, 0.0))


def phases_of(steps: Sequence[WatchedStep], limits: Sequence[Mapping[str, float]]) -> list[Phase]:
    """Steps that compute prompts, and those that decode one token of each row; `limits` are those of each step."""
    phases = []
    for name, decodes in (("prompts", False), ("decode", True)):
        chosen = [
            (step, least) for step, least in zip(steps, limits, strict=True) if (max(step.shape.tokens) == 1) == decodes
        ]
        if chosen:
            phases.append(
                Phase(
                    name=name,
                    num_steps=len(chosen),
                    seconds=sum(step.seconds for step, _ in chosen),
                    parts=_sum([parts_of(step) for step, _ in chosen]),
                    waits={
                        "linears": sum(step.kernels.waits.linears for step, _ in chosen),
                        "attention": sum(step.kernels.waits.attention for step, _ in chosen),
                    },
                    limits=_sum([least for _, least in chosen]),
                )
            )
    return phases


def _sum(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in found) for name in found[0]}
