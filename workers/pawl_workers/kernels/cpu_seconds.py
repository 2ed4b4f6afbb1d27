"""Where the time of steps goes, by the clocks of the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KernelSeconds", "LayerSeconds"]


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds in layers by kind of operation.

    Attributes:
        norms: and the embedding, where it is part of the program.
        placing: turning queries and keys, and writing keys and values.
        routing: choosing experts, sorting tokens by them, and adding up what they found.
    """

    norms: float
    linears: float
    placing: float
    attention: float
    routing: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.norms + self.linears + self.placing + self.attention + self.routing


@dataclass(frozen=True, slots=True)
class KernelSeconds:
    """Where the time of steps went, by the clocks of the kernels.

    Attributes:
        work: of the first thread, in the layers, and in the final norm where it is part of their program.
        waits: of the first thread for the others, after an operation, by the kind of that.
        entering: what the calls that run layers took beyond both.
        head: the head, and the final norm where it is not part of the program.
        sampling: choosing tokens and describing them.
    """

    work: LayerSeconds
    waits: LayerSeconds
    entering: float
    head: float
    sampling: float
