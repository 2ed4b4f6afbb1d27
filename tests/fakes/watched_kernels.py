"""Calls the compiled kernels over drawn shapes, for sanitizers: `python -m ... LIBRARY [GROUP | CHECKPOINT]...`.

Each buffer lies in memory of its own, and ends where that does: the large pages that weights, blocks and the kernels'
own memory share otherwise would hide what is read or written behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.coded_weights import ExponentCode
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.cpu_linear import Workspace
from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.kernels.cpu_screen import CpuHead
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.weight_memory import WeightMemory
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind, QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import TokenMasks
from pawl_workers.sampling.table import SamplingTable
from tests.fakes.attention_cases import arrays_of
from tests.fakes.cached_attention import CACHE_TYPES, CachedAttention, CachedCase
from tests.fakes.sampling_oracle import as_words, make_batch
from tests.fakes.screened import choose_tokens
from tests.fakes.watched_worker import serve, use

__all__ = ["GROUPS"]

_STORED = (torch.float32, torch.float16, torch.bfloat16)
_SIZES = (1, 3, 16, 31, 32, 33, 48, 64, 96, 100, 129)
_VOCABULARIES = (1, 5, 8, 31, 63, 64, 65, 300, 1025)
_WIDTHS = (1, 3, 8, 15, 16, 17, 40, 100)


def _call_linears(draw: Random) -> None:
    """Weights of every type: packed, read back, and multiplied with few rows and many."""
    for scales in (None, ByteScales(), ByteScales(32), ByteScales(128)):
        kernels = CpuKernels(torch.float32, scales)
        for stored in _STORED * 3:
            shape = draw.choice(_SIZES), draw.choice(_SIZES)
            linear = kernels.pack_linear(torch.randn(shape).to(stored), draw.choice([None, torch.randn(shape[0])]))
            linear.unpack()
            for num_rows in (1, draw.randint(2, 16), draw.randint(17, 130)):
                linear(torch.randn(num_rows, shape[1]))


def _screen_heads(draw: Random) -> None:
    """Greedy tokens without all logits, of few rows and many, on one thread and on two; some rows are not finite."""
    kernels = CpuKernels()
    for stored in _STORED * 3:
        shape = draw.choice(_VOCABULARIES), draw.choice(_SIZES)
        head = kernels.pack_head(torch.randn(shape).to(stored), None)
        if not isinstance(head, CpuHead):
            return  # matrix tiles need none
        for num_rows in (1, draw.randint(2, 16), draw.randint(17, 40)):
            x = torch.randn(num_rows, shape[1])
            x[::7, 0] = draw.choice([0.0, torch.nan, 1e30])
            choose_tokens(head, x, draw.choice([1, 2]))


def _code_weights(draw: Random) -> None:
    """To and from 12 bits, which every processor can do; two of the weights are exceptions."""
    library = replace(load_library(), multiplies_coded=True)
    for shape in ((1, 32), (33, 96), (70, 32 * draw.randint(1, 3))):
        weight = torch.randint(1, 256, shape).to(torch.bfloat16)
        ExponentCode.of(weight, library)
        weight.view(-1)[[0, -1]] = 0.0
        code = ExponentCode(bytes(range(127, 143)), exceptions=2)  # 1 to 65535
        packed = _exact(code.packed_bytes(*shape, library.panel_width))
        code.pack(weight, packed, library)
        assert torch.equal(code.unpack(packed, *shape, library), weight.float())


def _call_attention(draw: Random) -> None:
    """Caches of every type: whole prompts, chunks and single tokens, on one thread and on two that share out splits."""
    for cache_dtype in CACHE_TYPES * 3:
        kv_heads, head_dim = draw.choice([1, 2]), draw.choice([2, 8, 16, 40, 80])
        num_heads = kv_heads * draw.choice([1, 3, 5, 26])
        rule = AttentionRule(
            scale=0.3,
            window=draw.choice([None, 1, 20, 100]),
            softcap=draw.choice([None, 4.0]),
            sinks=draw.choice([None, torch.randn(num_heads)]),
        )
        lengths = draw.choice([1, 31, 33]), draw.choice([190, 513, 600])
        attention = CachedAttention(
            CachedCase(AttentionShape(num_heads, kv_heads, head_dim), rule, cache_dtype, lengths)
        )
        ends = list(enumerate(lengths))
        for step in ([(i, end - 1, end) for i, end in ends], [(i, end // 2, end) for i, end in ends], [(1, 5, 6)]):
            attention.attend(step)
            torch.set_num_threads(2)
            attention.attend([step[-1]])
            torch.set_num_threads(1)


def _call_elementwise(draw: Random) -> None:
    """Norms, activations, and queries and keys that are normalised, turned and written."""
    kernels = CpuKernels()
    for width in _WIDTHS:
        x = torch.randn(draw.randint(1, 9), width)
        for bias in (None, torch.randn(width)):
            kind = NormKind.RMS if bias is None else draw.choice([*NormKind])
            kernels.pack_norm(NormWeights(kind, torch.randn(width), bias, 1e-5))(x)
        for activation in Activation:
            kernels.pack_activation(activation, gated=False)(x)
            kernels.pack_activation(activation, gated=True)(torch.randn(len(x), 2 * width))
    for cache_dtype in CACHE_TYPES:
        for kind in (None, *QueryKeyNorm):
            _place(draw, CpuKernels(cache_dtype), cache_dtype, kind)


def _place(draw: Random, kernels: CpuKernels, cache_dtype: torch.dtype, kind: QueryKeyNorm | None) -> None:
    """The last token of the last block included. A few of the values are far out of what the cache holds."""
    head_dim, length = draw.choice([2, 12, 16, 40]), 64
    shape = AttentionShape(6, 2, head_dim)
    heads = torch.randn(length, shape.num_heads + 2 * shape.num_kv_heads, head_dim)
    heads.view(-1)[[0, -1, 7, -7]] = torch.tensor([1e30, -1e30, torch.inf, torch.nan])
    norms = None
    if kind is not None:
        queries, keys = (1, 1) if kind is QueryKeyNorm.HEAD else (shape.num_heads, shape.num_kv_heads)
        norms = QueryKeyNormWeights(kind, torch.randn(queries * head_dim), torch.randn(keys * head_dim), 1e-5)
    turned = draw.choice([2, head_dim])
    rotary = torch.rand(length, 1, turned), torch.rand(length, 1, turned)
    caches = [torch.zeros(cache, dtype=cache_dtype) for cache in kernels.cache_shapes(3, shape)]
    layout = kernels.lay_out(arrays_of([(0, 0, length)], np.array([[2, 1]])), shape)
    kernels.place(heads, draw.choice([None, rotary]), norms, caches[0], caches[1], layout)


def _call_sampler(draw: Random) -> None:
    """Vocabularies around whole blocks; rows with every filter, with penalties, bias and masks, and such as fail."""
    sampler = CpuSampler(load_library())
    for vocab_size in _VOCABULARIES:
        token_ids = range(vocab_size)
        specs = [
            SamplingSpec(
                temperature=draw.choice([0.0, 1e-9, 0.7, 50.0]),
                top_k=draw.choice([0, 1, 40, 2000]),
                top_p=draw.choice([1.0, 1e-9, 0.3, 0.999]),
                min_p=draw.choice([0.0, 0.2, 1.0]),
                repetition_penalty=draw.choice([1.0, 1.3]),
                logit_bias=draw.choice([{}, {0: 100.0, vocab_size - 1: -1e38}]),
                seed=draw.getrandbits(64),
            )
            for _ in range(30)
        ]
        table, rows = SamplingTable(len(specs)), range(len(specs))
        for row, spec in enumerate(specs):
            table.add(row, spec, draw.choices(token_ids, k=5), [vocab_size - 1])
        allowed = [draw.choices(token_ids, k=3), [vocab_size - 1], []]
        masks = TokenMasks(as_words(allowed, vocab_size), np.array([row % 4 - 1 for row in rows]))
        scores = torch.randn(len(specs), vocab_size) * draw.choice([0.0, 1.0, 1e30])
        scores[-1, -1] = torch.nan
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            sampler.choose(scores, make_batch(sampler, table, rows, rows))
            sampler.choose(scores, make_batch(sampler, table, rows, [1 << 40] * len(rows), masks=masks))
            best = np.array([draw.choice([0, 1, min(20, vocab_size)]) for _ in rows])
            sampler.describe(scores, np.arange(len(rows)), np.full(len(rows), vocab_size - 1), best)
        torch.set_num_threads(1)


def _exact(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)  # torch aligns to 64 bytes


class _ExactWorkspace(Workspace):
    def address(self, num_bytes: int) -> int:
        """New memory for each call."""
        self._memory = _exact(num_bytes)
        return self._memory.data_ptr()


GROUPS: Mapping[str, Callable[[Random], None]] = {
    "linears": _call_linears,
    "coded": _code_weights,
    "screen": _screen_heads,
    "attention": _call_attention,
    "elementwise": _call_elementwise,
    "sampling": _call_sampler,
}


def main(library: str, names: Sequence[str]) -> None:
    """Call the kernels of some groups; what is no name of a group is a checkpoint, which is served."""
    use(Path(library))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with ExitStack() as patches:
        patches.enter_context(patch.object(WeightMemory, "take", lambda _, num_bytes: _exact(num_bytes)))
        patches.enter_context(patch("pawl_workers.kv_cache.map_large_pages", _exact))
        patches.enter_context(patch("pawl_workers.kernels.cpu.Workspace", _ExactWorkspace))
        for name in names:
            if name in GROUPS:
                GROUPS[name](Random(0))
            else:
                for kv_dtype in ("float32", "int8"):
                    serve(name, kv_dtype, (1, 7, 40, 90))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
