"""Kernels: the operations whose speed depends on the machine, behind one protocol.

`reference` is plain torch, runs anywhere and is the oracle; `cpu` is our own C; `onednn` serves a CPU where no compiler
is at hand; `triton` serves GPUs. Knows no models, no rows and no plans.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, Batch, IntArray, SequenceArrays
from pawl_workers.errors import WorkerError
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.model.packed import Packer
from pawl_workers.model.weights import AttentionRule, LayerWeights, QueryKeyNormWeights, Weights
from pawl_workers.sampling.batch import Sampler
from pawl_workers.staging import Staging

__all__ = ["CompilesHead", "Kernels", "LayerProgram", "Precision", "ScoringProgram", "choose_backend"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """Types in which cached keys and values, and the weights of linear layers, are kept; None = exact.

    Attributes:
        cache: of keys and values.
        weights: int8 for bytes with scales.
        group: inputs that share a scale, 32, 64 or 128; None = all of an output feature.
        screened: whether an exact head is kept in bytes too, where the backend can find greedy tokens by them.
    """

    cache: torch.dtype | None = None
    weights: torch.dtype | None = None
    group: int | None = None
    screened: bool = True


class LayerProgram(Protocol):
    """All layers of a model in one call."""

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Take the stream, [T, D], through all layers; it may be changed in place. Writes keys and values.

        Rows that `batch` asks nothing of may be left as they were before the last layer, but for one whose keys or
        values there are not finite: that is not finite either.
        """
        ...


class ScoringProgram(Protocol):
    """The embedding, all layers, the final norm and the head in one call."""

    def run_through_head(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a step of which every token is sampled from, [T], from the embedding through all layers and the head.

        Returns:
            The stream after the last layer, [T, D], as a `LayerProgram` gives it, and what the head's projection gives
            for each of its rows, [T, V] float32.
        """
        ...

    @property
    def chooses(self) -> bool:
        """Whether it can choose the best tokens without all logits."""
        ...

    def run_through_choice(self, batch: Batch) -> tuple[Tensor, IntArray]:
        """Run a step from the embedding through all layers, and choose the best token of each of S samples.

        Returns:
            The stream, and the tokens that a `Sampler` would choose at temperature 0 from all logits, [S]:
            `NOT_FINITE` where a logit is not finite. Both hold until the program is run again.
        """
        ...


@runtime_checkable
class CompilesHead(Protocol):
    """A backend whose programs can go on to the head."""

    def compile_head(self, program: LayerProgram, weights: Weights) -> ScoringProgram:
        """Compile what comes after the layers of a program that this backend made of these weights."""
        ...


class Kernels(Packer, Protocol):
    """One backend. Block 0 of a cache is the null block."""

    @property
    def name(self) -> str:
        """The backend's name."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    @property
    def sampler(self) -> Sampler:
        """Chooses and describes tokens."""
        ...

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a layer's keys and values; the first axis counts blocks, the second key-value heads."""
        ...

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of the cache's elements for a model computed in `dtype`."""
        ...

    def compile_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> LayerProgram | None:
        """Compile all layers over their keys and values into one call; None where the backend has none.

        Gives the bits that the stages give one by one.
        """
        ...

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Work out, once a step, what `place` and `attend` of every layer share."""
        ...

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Normalise and turn the new tokens' queries and keys, and write keys and values to their slots in the cache.

        Args:
            heads: queries, keys and values of each token, [T, H + 2K, head_dim].
            rotary: cosines and signed sines, each [T, 1, rotary_dim]; None where nothing turns.
            norms: of queries and keys, if the model has them.
            keys: this layer's keys.
            values: this layer's values.
            layout: of this step.

        Returns:
            The queries, [T, H, head_dim].
        """
        ...

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend each query to all tokens of its sequence up to itself, as `rule` says.

        Args:
            q: queries, [T, H, head_dim], not scaled.
            rule: scale, window, softcap and sinks of this layer.
            keys: this layer's keys, the step's own included.
            values: this layer's values.
            layout: of this step.

        Returns:
            [T, H, head_dim].
        """
        ...


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    shape: AttentionShape,
    name: str = "auto",
    *,
    precision: Precision = Precision(),
    staging: Staging | None = None,
    strict: bool = False,
) -> Kernels:
    """Choose the kernels for a device, a data type and a shape of heads.

    Args:
        device: where they run.
        dtype: of the model.
        shape: of its heads.
        name: of a backend, or `auto`.
        precision: of cache and weights.
        staging: carries a step's integers to a GPU; None = each array by itself.
        strict: bits that depend on nothing else in the step, where that has a price (`triton`).

    Raises:
        WorkerError: the name is not known, or these kernels cannot serve what is asked for.
    """
    # Imported here: the backends implement the protocol above.
    from pawl_workers.kernels.onednn import OneDnnKernels  # noqa: PLC0415 - as above
    from pawl_workers.kernels.reference import ReferenceKernels  # noqa: PLC0415 - as above

    for_cpu = device.type == "cpu" and dtype is torch.float32
    if precision.cache is not None:
        if not for_cpu or name not in {"auto", "cpu"}:
            raise WorkerError(f"only the cpu kernels keep KV in other types; kernels are {name!r} on {device}")
        return _compiled(shape, precision)
    byte_scales = _byte_scales(precision)
    if byte_scales is not None and (name == "triton" or (name == "auto" and not for_cpu)):
        raise WorkerError(
            f"only the cpu, onednn and reference kernels keep weights in bytes; kernels are {name!r} on {device}"
        )
    makers: dict[str, Callable[[], Kernels]] = {
        "reference": lambda: ReferenceKernels(device, byte_scales),
        "cpu": lambda: _compiled(shape, precision),
        "onednn": lambda: OneDnnKernels(byte_scales),
        "triton": lambda: _triton(device, dtype, shape, staging, strict),
    }
    if name == "auto":
        return _first_of(_fastest(device, for_cpu=for_cpu), makers)
    if name not in makers:
        raise WorkerError(f"there are no kernels {name!r}; known: auto, {', '.join(makers)}")
    if name in {"cpu", "onednn"} and not for_cpu:
        raise WorkerError(f"the {name} kernels compute in float32 on a cpu, not in {dtype} on {device}")
    return makers[name]()


def _fastest(device: torch.device, *, for_cpu: bool) -> Sequence[str]:
    """The kernels that can serve a device, the fastest first; the last ones always can."""
    if device.type == "cuda":
        return ("triton", "reference")
    return ("cpu", "onednn") if for_cpu else ("reference",)


def _first_of(names: Sequence[str], makers: Mapping[str, Callable[[], Kernels]]) -> Kernels:
    """Make the first kernels that can be made; the log says why they are not the ones before."""
    for name, slower in itertools.pairwise(names):
        try:
            return makers[name]()
        except WorkerError as error:
            log.warning("serving with the slower %s kernels: %s", slower, error)
    return makers[names[-1]]()


def _byte_scales(precision: Precision) -> ByteScales | None:
    return ByteScales(precision.group) if precision.weights is torch.int8 else None


def _compiled(shape: AttentionShape, precision: Precision) -> Kernels:
    from pawl_workers.kernels.cpu import CpuKernels  # noqa: PLC0415 - as above
    from pawl_workers.kernels.native.library import BuildError  # noqa: PLC0415 - as above

    if not CpuKernels.supports(shape):
        raise WorkerError(f"the cpu kernels serve heads of up to 512 dimensions, not {shape.head_dim}")
    try:
        return CpuKernels(precision.cache or torch.float32, _byte_scales(precision), screens=precision.screened)
    except BuildError as error:
        raise WorkerError(f"the cpu kernels are not built: {error}") from error


def _triton(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, staging: Staging | None, strict: bool
) -> Kernels:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise WorkerError(
            f"the triton kernels compute on cuda, not on {device}; TRITON_INTERPRET=1 runs them in numpy, for tests"
        )
    try:
        from pawl_workers.kernels.triton.backend import TritonKernels  # noqa: PLC0415 - as above
    except ImportError as error:
        raise WorkerError(f"the triton kernels need the package triton: {error}; pip install triton") from error
    return TritonKernels(dtype, shape, staging or Staging(device), strict=strict)
