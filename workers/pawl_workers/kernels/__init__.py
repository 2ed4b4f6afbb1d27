"""Kernels: the operations whose speed depends on the machine, behind one protocol.

`reference` is plain torch, runs anywhere and is the oracle; `cpu` is oneDNN and batched matrix products.
Knows no models, no rows and no plans.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.errors import WorkerError
from pawl_workers.model.weights import PackedLinear

__all__ = ["Kernels", "choose_backend"]


class Kernels(Protocol):
    """One backend. The cache tensors are `[num_blocks, K, block_size, head_dim]`; block 0 is the null block."""

    @property
    def name(self) -> str:
        """The backend's name."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack a weight [out, in] and a bias [out]."""
        ...

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Work out, once a step, what `write` and `attend` of every layer share."""
        ...

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
        """Write the new tokens' k and v, [T, K, head_dim], to their slots in this layer's cache."""
        ...

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend each query to all tokens of its sequence up to itself.

        Args:
            q: [T, H, head_dim], not scaled.
            keys: this layer's keys, with the new ones written.
            values: likewise.
            layout: of this step.

        Returns:
            [T, H, head_dim].
        """
        ...


def choose_backend(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Kernels:
    """Choose the kernels for a device and data type.

    Raises:
        WorkerError: the name is not known, or these kernels cannot serve the device or type.
    """
    # Imported here: the backends implement the protocol above.
    from pawl_workers.kernels.cpu import CpuKernels  # noqa: PLC0415 - as above
    from pawl_workers.kernels.reference import ReferenceKernels  # noqa: PLC0415 - as above

    for_cpu = device.type == "cpu" and dtype is torch.float32
    match name:
        case "auto":
            return CpuKernels() if for_cpu else ReferenceKernels(device)
        case "reference":
            return ReferenceKernels(device)
        case "cpu" if for_cpu:
            return CpuKernels()
        case "cpu":
            raise WorkerError(f"the cpu kernels compute in float32 on a cpu, not in {dtype} on {device}")
        case _:
            raise WorkerError(f"there are no kernels {name!r}; known: auto, reference, cpu")
