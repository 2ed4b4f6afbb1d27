"""The CPU kernels: C, float32, blocks of 32 tokens; weights in 16 bits where that loses nothing.

The bits of a token's result do not depend on what else is in the step, on chunk boundaries, on tiles or on the number
of threads, by construction: every sum runs in an order that the C sources fix. Built by `native.build`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.batch import AttentionLayout, AttentionShape, SequenceArrays
from pawl_workers.kernels import LayerProgram
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.cpu_calls import activation_number, attention_call, norm_call, padded_dim, place_call
from pawl_workers.kernels.cpu_compile import compile_choice, compile_embedding, compile_head, compile_program
from pawl_workers.kernels.cpu_decodes import CpuDecodeMover
from pawl_workers.kernels.cpu_layout import CpuLayout, lay_out
from pawl_workers.kernels.cpu_linear import NARROW, CpuLinear, Workspace, packed_bytes
from pawl_workers.kernels.cpu_program import CpuProgram
from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.cpu_screen import CpuHead, HeadScreen, can_screen
from pawl_workers.kernels.decode_mover import DecodeArrays
from pawl_workers.kernels.native.library import Library, load_library
from pawl_workers.kernels.weight_memory import WeightMemory
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation
from pawl_workers.model.weights import AttentionRule, LayerWeights, QueryKeyNormWeights, Weights

__all__ = ["CpuKernels"]

_BLOCK = 32
_MOST_DIM = 512
_SCALE_BYTES = 4  # of one token in one head, for a cache of bytes
_CACHE_FORMATS = {torch.float32: 0, torch.float16: 1, torch.int8: 3}  # as in linear.h


class _Norm:
    __slots__ = ("_call", "_library", "weights")

    def __init__(self, weights: NormWeights, library: Library) -> None:
        self.weights = weights
        self._library, self._call = library, norm_call(weights)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        call = self._call
        call.x, call.y, call.rows, call.n = x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1]
        self._library.norm(ctypes.addressof(call), torch.get_num_threads())
        return y


@dataclass(frozen=True, slots=True)
class _Activation:
    number: int
    gated: bool
    library: Library

    def __call__(self, hidden: Tensor) -> Tensor:
        num_rows, width = hidden.shape[0], hidden.shape[1] // (2 if self.gated else 1)
        y = torch.empty(num_rows, width)
        self.library.activate(
            hidden.data_ptr(), y.data_ptr(), num_rows, width, self.number, self.gated, torch.get_num_threads()
        )
        return y


class CpuKernels:
    """Packed linears, attention in place, norms, gates and the rotary turn, all compiled.

    Args:
        cache_dtype: of keys and values: float32, float16, or int8 with a scale per token and head.
        byte_scales: weights in bytes, and how they share scales.
        screens: an exact head in bytes too, by which greedy rows find their tokens.

    Raises:
        BuildError: the kernels cannot be built.
    """

    name = "cpu"
    block_size = _BLOCK

    def __init__(
        self, cache_dtype: torch.dtype = torch.float32, byte_scales: ByteScales | None = None, *, screens: bool = True
    ) -> None:
        self._library = load_library()
        self._workspace = Workspace()
        self._memory = WeightMemory()
        self._byte_scales = byte_scales
        self._screens = screens and byte_scales is None and not self._library.multiplies_coded
        self._cache_dtype = cache_dtype
        self._format = _CACHE_FORMATS[cache_dtype]
        self.sampler = CpuSampler(self._library)

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        """Whether heads of this width can be served."""
        return shape.head_dim <= _MOST_DIM

    def linear_dtype(self, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
        """16 bits stay as they are stored: the kernels widen them exactly."""
        return stored if stored in NARROW else computed

    def packed_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """Whole panels in the stored type, or, for fp32, at most in that."""
        dtype = self.linear_dtype(stored, computed)
        return packed_bytes(shape[0], shape[1], dtype, self._library.panel_width, self._byte_scales)

    def packed_head_bytes(self, shape: tuple[int, ...], stored: torch.dtype, computed: torch.dtype) -> int:
        """And what its screen takes."""
        screened = self._screens and can_screen(shape[1])
        screen = HeadScreen.bytes_of(shape[0], shape[1], self._library) if screened else 0
        return self.packed_bytes(shape, stored, computed) + screen

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> CpuLinear:
        """Pack into panels."""
        return CpuLinear(weight, bias, self._library, self._workspace, self._memory, self._byte_scales)

    def pack_head(self, weight: Tensor, bias: Tensor | None) -> CpuLinear:
        """As any other, and once more in bytes where that can be."""
        if self._screens and bias is None and can_screen(weight.shape[1]):
            return CpuHead(weight, self._library, self._workspace, self._memory)
        return self.pack_linear(weight, bias)

    def pack_norm(self, weights: NormWeights) -> _Norm:
        """Bind to the compiled norms."""
        return _Norm(weights, self._library)

    def pack_activation(self, activation: Activation, *, gated: bool) -> _Activation:
        """Bind to the compiled activations."""
        return _Activation(activation_number(activation), gated, self._library)

    def cache_shapes(self, num_blocks: int, shape: AttentionShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys lie transposed inside a block, [num_blocks, K, head_dim, 32]; head_dim is padded to a multiple of 16.

        In a cache of bytes the 32 scales of a block and head follow its bytes.
        """
        heads, head_dim = shape.num_kv_heads, padded_dim(shape.head_dim)
        if self._cache_dtype is torch.int8:
            block = (num_blocks, heads, (head_dim + _SCALE_BYTES) * _BLOCK)
            return block, block
        return (num_blocks, heads, head_dim, _BLOCK), (num_blocks, heads, _BLOCK, head_dim)

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As the backend was made for; the model itself computes in float32."""
        del dtype
        return self._cache_dtype

    def compile_layers(
        self, layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]]
    ) -> CpuProgram | None:
        """Compile what all layers do; None where the width of a gate is not one of whole registers."""
        return compile_program(layers, caches, self._format, self._library)

    def compile_head(self, program: LayerProgram, weights: Weights) -> CpuProgram:
        """See `CompilesHead`."""
        assert isinstance(program, CpuProgram)  # noqa: S101 - narrows the type
        embedding, head = compile_embedding(weights.embedding), weights.head.linear
        program.add_head(embedding, compile_head(weights.final_norm, head), head.out_features)
        if weights.head.divisor == 1.0 and weights.head.softcap is None:  # which may make different logits equal
            program.add_choice(embedding, compile_choice(weights.final_norm, head))
        return program

    def lay_out(self, sequences: SequenceArrays, shape: AttentionShape) -> AttentionLayout:
        """Cut the step into tiles; where they are cut changes no bits."""
        return lay_out(sequences, shape, torch.get_num_threads())

    def decode_mover(self, arrays: DecodeArrays) -> CpuDecodeMover | None:
        """See `MovesDecodes`."""
        layout = arrays.batch.attention
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        return CpuDecodeMover(arrays, layout, self._library) if CpuDecodeMover.can_move(arrays) else None

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
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        num_tokens, width, head_dim = heads.shape
        num_kv_heads = keys.shape[1]
        num_heads = width - 2 * num_kv_heads
        q = torch.empty(num_tokens, num_heads, head_dim)
        call = place_call(norms, num_heads, num_kv_heads, head_dim, (keys, values), self._format)
        call.heads, call.q, call.slots, call.rows = heads.data_ptr(), q.data_ptr(), layout.slots.data_ptr(), num_tokens
        if rotary is not None:
            call.cosines, call.sines, call.turned = rotary[0].data_ptr(), rotary[1].data_ptr(), rotary[0].shape[-1]
        self._library.place(ctypes.byref(call), torch.get_num_threads())
        return q

    def attend(self, q: Tensor, rule: AttentionRule, keys: Tensor, values: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend each query to all tokens of its sequence up to itself, over the blocks where they lie."""
        assert isinstance(layout, CpuLayout)  # noqa: S101 - narrows the type
        num_threads = torch.get_num_threads()
        _, num_heads, head_dim = q.shape
        attended = torch.empty_like(q)
        call = attention_call(rule, num_heads, keys.shape[1], head_dim, (keys, values), self._format)
        call.q, call.out, call.tables = q.data_ptr(), attended.data_ptr(), layout.tables.data_ptr()
        call.tiles, call.num_tiles, call.table_stride = layout.tiles.data_ptr(), len(layout.tiles), layout.table_stride
        if layout.pairs is not None:
            partials = torch.empty(layout.partial_floats(keys.shape[1], call.padded))
            call.pairs, call.num_pairs = layout.pairs.data_ptr(), len(layout.pairs)
            call.partials = partials.data_ptr()
        scratch = self._workspace.address(num_threads * self._library.scratch_bytes)
        self._library.attend(ctypes.byref(call), scratch, num_threads)
        return attended
