"""What happens to a simulated replica: requests, aborts and faults, drawn beforehand and equal for every policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pawl_server.sim.streams import Segment

__all__ = ["Fault", "SimulatedRequest", "Trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """One request. Lengths in tokens, times in seconds.

    Attributes:
        arrival_s: after the start, or after the end of the request that it follows.
        prompt: segments whose tokens are the prompt.
        output_tokens: how many it would generate before it ends by itself; the scheduler does not know it.
        max_output_tokens: what it declares.
        tenant: whom it is charged to, and who shares its cached prefixes.
        priority: class, the higher the better.
        abort_after_s: cancelled so long after its arrival; None = never.
        follows: index of the request whose end it waits for (the next turn of a conversation); -1 = none.
        sample_of: index of the request that it is a further sample of: it arrives with it, has the same prompt, tenant
            and maximum, and an output of its own; -1 = none.
        group: what a report calls it, such as "chat" or "adversary".
    """

    arrival_s: float
    prompt: tuple[Segment, ...]
    output_tokens: int
    max_output_tokens: int
    tenant: str = ""
    priority: int = 0
    abort_after_s: float | None = None
    follows: int = -1
    sample_of: int = -1
    group: str = "chat"

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return sum(segment.length for segment in self.prompt)


@dataclass(frozen=True, slots=True)
class Fault:
    """The worker dies and loses its KV; a new one answers `down_s` later."""

    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by index, those that follow others included, and faults."""

    name: str
    requests: Sequence[SimulatedRequest]
    faults: Sequence[Fault] = ()

    def __post_init__(self) -> None:
        for index, request in enumerate(self.requests):
            if request.output_tokens < 1 or request.prompt_tokens < 1:
                raise ValueError(f"request {index} of {self.name}: prompt and output have at least one token each")
            if request.follows >= index:
                raise ValueError(f"request {index} of {self.name} follows {request.follows}, which comes later")
            if request.sample_of >= 0 and not self._is_sample(index, request):
                raise ValueError(f"request {index} of {self.name} is no further sample of request {request.sample_of}")

    def _is_sample(self, index: int, request: SimulatedRequest) -> bool:
        first = self.requests[request.sample_of]
        shared = ("prompt", "max_output_tokens", "tenant", "priority")
        alike = all(getattr(request, name) == getattr(first, name) for name in shared)
        return request.sample_of < index and first.sample_of < 0 and request.follows < 0 and alike
