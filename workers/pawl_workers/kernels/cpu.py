"""The CPU kernels: C, float32, blocks of 32 tokens; weights in 16 bits where that loses nothing.

The bits of a token's result do not depend on what else is in the step, on chunk boundaries, on tiles or on the number
of threads, by construction: every sum runs in an order that the C sources fix. Built by `native.build`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.native.library import Library, load_library
from pawl_workers.kernels.reference import ReferenceActivation, ReferenceNorm
from pawl_workers.model.spec import Activation, NormKind, QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, NormWeights, PackedActivation, PackedNorm, QueryKeyNormWeights

__all__ = ["CpuKernels", "CpuLinear"]

_PANEL = 16
_BLOCK = 32
_MOST_ROWS = 24  # query rows of a tile, as in attention.c
_MOST_DIM = 512
_NO_WINDOW = 1 << 62


_NARROW = (torch.bfloat16, torch.float16)
_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in linear.c


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds every value. Compared in parts: a head is the largest tensor of all."""
    parts = (weight[begin : begin + 4096] for begin in range(0, weight.shape[0], 4096))
    return all(torch.equal(part.to(dtype).float(), part) for part in parts)


class _Workspace:
    """Memory that kernels share from call to call; one step runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Where so many bytes are free."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory.data_ptr()


class CpuLinear:
    """A linear layer whose weight lies in panels of 16 output features.

    In bf16 or fp16 if it comes so, or if every value is exact in it, which halves the bytes a step reads; else in fp32.
    """

    __slots__ = ("_format", "_library", "_packed", "_workspace", "bias", "in_features", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library, workspace: _Workspace) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.contiguous()
        self._library, self._workspace = library, workspace
        dtype = weight.dtype
        if dtype is torch.float32:
            dtype = next((narrow for narrow in _NARROW if _is_exact(weight, narrow)), dtype)
        self._format = _FORMATS[dtype]
        source = weight.to(dtype).contiguous()
        num_panels = -(-self.out_features // _PANEL)
        self._packed = torch.empty(num_panels, self.in_features, _PANEL, dtype=dtype)
        pack = library.pack_float if dtype is torch.float32 else library.pack_short
        pack(source.data_ptr(), self._packed.data_ptr(), self.out_features, self.in_features, torch.get_num_threads())

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weight takes."""
        return self._packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, [T, in] -> [T, out]; a row's bits do not depend on T."""
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows, in_features, out_features = x.shape[0], self.in_features, self.out_features
        y = torch.empty(num_rows, out_features)
        if num_rows:
            num_threads = torch.get_num_threads()
            wide = self._workspace.address(num_threads * in_features * _PANEL * 4) if self._format else None
            self._library.linear(
                x.data_ptr(),
                self._packed.data_ptr(),
                None if self.bias is None else self.bias.data_ptr(),
                y.data_ptr(),
                wide,
                num_rows,
                in_features,
                out_features,
                x.stride(0),
                out_features,
                self._format,
                num_threads,
            )
        return y

    def unpack(self) -> Tensor:
        """Return the weight, [out, in], bit for bit."""
        return self._packed.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features].float()


@dataclass(frozen=True, slots=True)
class _RmsNorm:
    weights: NormWeights
    library: Library

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        num_rows, width = x.shape
        self.library.rms_norm(
            x.data_ptr(),
            None,
            self.weights.weight.data_ptr(),
            y.data_ptr(),
            num_rows,
            width,
            self.weights.epsilon,
            torch.get_num_threads(),
        )
        return y


@dataclass(frozen=True, slots=True)
class _SiluGate:
    library: Library

    def __call__(self, hidden: Tensor) -> Tensor:
        num_rows, width = hidden.shape
        y = torch.empty(num_rows, width // 2)
        self.library.silu_gate(hidden.data_ptr(), y.data_ptr(), num_rows, width // 2, torch.get_num_threads())
        return y


@dataclass(frozen=True, slots=True)
class _Layout(AttentionLayout):
    """What all layers of a step share.

    Attributes:
        slots: block * 32 + offset of each token, [T].
        tables: [S, most blocks].
        tiles: sequence, first row, its position, tokens, first head, heads, [tiles, 6].
    """

    slots: Tensor
    tables: Tensor
    tiles: Tensor


class CpuKernels:
    """Packed linears, attention in place, norms, gates and the rotary turn, all compiled.

    Raises:
        BuildError: the kernels cannot be built.
    """

    name = "cpu"
    block_size = _BLOCK

    def __init__(self) -> None:
        self._library = load_library()
        self._workspace = _Workspace()
        self.sampler = CpuSampler(self._library)

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        """Whether heads of this width can be served."""
        return shape.head_dim % 2 == 0 and shape.head_dim <= _MOST_DIM

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """16 bits stay as they are stored: the kernels widen them exactly."""
        return stored if stored in _NARROW else computed

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """Whole panels in the stored type, or, for fp32, at most in that."""
        return -(-shape[0] // _PANEL) * _PANEL * shape[1] * self.linear_dtype(stored, computed).itemsize

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> CpuLinear:
        """Pack into panels."""
        return CpuLinear(weight, bias, self._library, self._workspace)

    def pack_norm(self, weights: NormWeights) -> PackedNorm:
        """RMS norms are compiled, layer norms torch's."""
        if weights.kind is NormKind.RMS:
            return _RmsNorm(weights, self._library)
        return ReferenceNorm(weights)

    def pack_activation(self, activation: Activation, *, gated: bool) -> PackedActivation:
        """Gated SiLU is compiled, the others torch's."""
        if gated and activation is Activation.SILU:
            return _SiluGate(self._library)
        return ReferenceActivation(activation, gated)

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys lie transposed inside a block, [num_blocks, K, head_dim, 32]; head_dim is padded to a multiple of 8."""
        heads, head_dim = shape.num_kv_heads, -(-shape.head_dim // 8) * 8
        return (num_blocks, heads, head_dim, _BLOCK), (num_blocks, heads, _BLOCK, head_dim)

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Cut the step into tiles of up to 24 query rows; where they are cut changes no bits."""
        blocks = sequences.block_tables[sequences.sequence_of_token, sequences.positions // _BLOCK]
        slots = blocks * _BLOCK + sequences.positions % _BLOCK
        group = shape.num_heads // shape.num_kv_heads
        at_once = max(1, _MOST_ROWS // group)
        num_tiles = -(-sequences.lengths // at_once)
        sequence = np.repeat(np.arange(len(num_tiles)), num_tiles)
        token = (np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * at_once
        parts = []
        for first_head in range(0, group, _MOST_ROWS):
            tiles = np.empty((len(sequence), 6), dtype=np.int64)
            tiles[:, 0] = sequence
            tiles[:, 1] = sequences.starts[sequence] + token
            tiles[:, 2] = (sequences.contexts - sequences.lengths)[sequence] + token
            tiles[:, 3] = np.minimum(at_once, sequences.lengths[sequence] - token)
            tiles[:, 4] = first_head
            tiles[:, 5] = min(_MOST_ROWS, group - first_head)
            parts.append(tiles)
        return _Layout(
            torch.from_numpy(slots),
            torch.from_numpy(np.ascontiguousarray(sequences.block_tables)),
            torch.from_numpy(np.concatenate(parts)),
        )

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Normalise and turn queries and keys, write keys and values, return the queries."""
        assert isinstance(layout, _Layout)  # noqa: S101 - narrows the type
        num_tokens, width, head_dim = heads.shape
        num_kv_heads = keys.shape[1]
        num_heads = width - 2 * num_kv_heads
        q = torch.empty(num_tokens, num_heads, head_dim)
        self._library.turn_and_write(
            heads.data_ptr(),
            None if rotary is None else rotary[0].data_ptr(),
            None if rotary is None else rotary[1].data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            layout.slots.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            0 if rotary is None else rotary[0].shape[-1],
            values.shape[3],
            0.0 if norms is None else norms.epsilon,
            norms is not None and norms.kind is QueryKeyNorm.WIDTH,
            torch.get_num_threads(),
        )
        return q

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend each query to all tokens of its sequence up to itself, over the blocks where they lie."""
        assert isinstance(layout, _Layout)  # noqa: S101 - narrows the type
        num_threads = torch.get_num_threads()
        _, num_heads, head_dim = q.shape
        attended = torch.empty_like(q)
        self._library.attend(
            q.data_ptr(),
            attended.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            layout.tables.data_ptr(),
            layout.tiles.data_ptr(),
            self._workspace.address(num_threads * self._library.scratch_bytes),
            layout.tiles.shape[0],
            layout.tables.shape[1],
            num_heads,
            keys.shape[1],
            head_dim,
            values.shape[3],
            _NO_WINDOW if rule.window is None else rule.window,
            rule.scale,
            rule.softcap or 0.0,
            None if rule.sinks is None else rule.sinks.data_ptr(),
            num_threads,
        )
        return attended
