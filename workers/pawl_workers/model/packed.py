"""What a kernel backend makes of a checkpoint's tensors: the parts that it packs, and the packer that makes them.

Protocols, but for what a norm is made from. Knows no kernels: a linear layer is anything that can be applied and read
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pawl_workers.model.spec import Activation, NormKind

__all__ = [
    "ExpertPacker",
    "NormWeights",
    "PackedActivation",
    "PackedExperts",
    "PackedLinear",
    "PackedNorm",
    "Packer",
]


class PackedLinear(Protocol):
    """A linear layer in the form its kernel backend wants."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        ...

    @property
    def data_type(self) -> torch.dtype:
        """The type in which the weight is kept."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]."""
        ...

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit as it was packed."""
        ...


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Normalisation over the last axis: `weight` and `bias` are [D]; RMS norms have no bias."""

    kind: NormKind
    weight: Tensor
    bias: Tensor | None
    epsilon: float


class PackedNorm(Protocol):
    """A norm as its kernel backend computes it."""

    @property
    def weights(self) -> NormWeights:
        """What it was made from."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise each row of x, [T, D], to [T, D]."""
        ...


class PackedActivation(Protocol):
    """An activation as its kernel backend computes it: [T, I] -> [T, I], or, gated, [T, 2I] -> [T, I]."""

    def __call__(self, hidden: Tensor) -> Tensor: ...  # noqa: D102 - as the class says


class Packer(Protocol):
    """Turns what a checkpoint holds into the form of a kernel backend."""

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """Say in which type `pack_linear` takes a weight.

        Args:
            stored: the checkpoint's type.
            computed: the model's.

        Returns:
            One that holds what is wanted of the stored values: `stored` itself spares a wider copy.
        """
        ...

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """Return the most that a packed weight of this shape, [out, in], takes; types as for `linear_dtype`."""
        ...

    def packed_head_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """Return the same of the projection to the vocabulary, with all that `pack_head` keeps of it."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack a weight [out, in], in the type of `linear_dtype`, and a bias [out], in the model's type."""
        ...

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack the projection to the vocabulary likewise; its results may be of a wider type than the model's."""
        ...

    def pack_norm(self, weights: NormWeights) -> PackedNorm:
        """Bind a norm to its kernel."""
        ...

    def pack_activation(self, activation: Activation, *, gated: bool) -> PackedActivation:
        """Choose the kernel of an activation."""
        ...


class PackedExperts(Protocol):
    """All routed experts of a layer as one operation of their kernel backend."""

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """Compute, for each row of x, [T, D], the experts that its scores, [T, E], choose, and add them up: [T, D].

        The host is not asked which they are. They are added in the order of their numbers.
        """
        ...


@runtime_checkable
class ExpertPacker(Packer, Protocol):
    """A packer whose kernels compute all experts of a layer at once.

    Their weights are to lie one after the other; each is packed by `pack_linear`, as a view, as well.
    """

    def pack_experts(
        self, up: Tensor, down: Tensor, activate: PackedActivation, num_active: int, *, normalised: bool
    ) -> PackedExperts:
        """Bind experts without biases to their kernels.

        Args:
            up: gate above up, [E, 2I, D], or up alone, [E, I, D].
            down: [E, D, I].
            activate: of `pack_activation`.
            num_active: experts of a token.
            normalised: whether the shares of a token add up to 1.
        """
        ...
