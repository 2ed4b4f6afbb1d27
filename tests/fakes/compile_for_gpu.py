"""Compiles the triton kernels for an H100 (sm_90) on a machine without a GPU, and prints what each one needs.

A launch compiles what it would launch, specialised as it would be there, and runs nothing. One line of JSON per kernel:
its name, registers, spilled bytes, shared memory, and whether it multiplies by `wgmma` or `mma`. To be run in a process
of its own: the driver of triton is replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.triton.backend import TritonKernels
from pawl_workers.kernels.triton.draw import draw
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.triton.insert import insert
from pawl_workers.kernels.triton.layout import SPLIT, Layout
from pawl_workers.kernels.triton.linear import StrictLinear, WideLinear
from pawl_workers.kernels.triton.one_row import add_row, fire_row, multiply_row
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind, QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights
from pawl_workers.sampling.words import WORDS
from pawl_workers.staging import Staging

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CPU = torch.device("cpu")


class _Driver:
    """Names an H100 as the target; launches nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _report(variant: str, kernel: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = kernel.asm["ptx"]
    line = {
        "variant": variant,
        "kernel": kernel.metadata.name,
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": kernel.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _compile_instead(variant: str) -> None:
    def getitem(self: Any, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: _report(variant, self.warmup(*args, grid=grid, **kwargs))

    KernelInterface.__getitem__ = getitem


def _attention(
    variant: str, shape: AttentionShape, dtype: torch.dtype, rule: AttentionRule, norm: QueryKeyNorm, *, strict: bool
) -> None:
    _compile_instead(variant)
    kernels = TritonKernels(dtype, shape, Staging(CPU), strict=strict)
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tensors = [torch.zeros(n, dtype=torch.int32) for n in (64, 64, 64, 64, 64, 64)]
    tiles, tables = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(64, 32, dtype=torch.int32)
    cache = torch.zeros(kernels.cache_shapes(2, shape)[0], dtype=dtype)
    projected = torch.zeros(64, heads + 2 * kv_heads, dim, dtype=dtype)
    rotary = torch.zeros(64, 1, dim, dtype=dtype), torch.zeros(64, 1, dim, dtype=dtype)
    wide = norm is QueryKeyNorm.WIDTH
    norms = QueryKeyNormWeights(
        norm,
        torch.ones(dim * (heads if wide else 1), dtype=dtype),
        torch.ones(dim * (kv_heads if wide else 1), dtype=dtype),
        1e-6,
    )
    positions, owners, contexts, rows, sequences, _ = tensors
    tile_rows = kernels.tile_rows
    for num_splits in (1, 4):
        layout = Layout(positions, owners, tables, contexts, rows, sequences, tiles, tile_rows, SPLIT, num_splits)
        if num_splits == 1:
            kernels.place(projected, rotary, norms, cache, cache, layout)
        kernels.attend(projected[:, :heads].contiguous(), rule, cache, cache, layout)


def _experts(dtype: torch.dtype, num_rows: int, *, strict: bool) -> None:
    """Of Mixtral's kind: eight, of which two are chosen; few rows of each, and many."""
    _compile_instead(f"{num_rows} rows, {dtype}, {'strict' if strict else 'fast'}")
    up, down = torch.zeros(8, 2 * 768, 2048, dtype=dtype), torch.zeros(8, 2048, 768, dtype=dtype)
    experts = TritonExperts(up, TritonActivation(Activation.SILU, True, not strict), down, 2, True, strict)
    x, scores = torch.zeros(num_rows, 2048, dtype=dtype), torch.zeros(num_rows, 8, dtype=dtype)
    experts(x, scores)
    if experts.takes_single_rows and num_rows == 1:
        norm = TritonRmsNorm(NormWeights(NormKind.RMS, torch.ones(2048, dtype=dtype), None, 1e-6), fuses=True)
        experts.add_row(x, scores, 1.0, norm)


def main() -> None:
    """Compile everything."""
    triton.runtime.driver.set_active(_Driver())
    plain, gemma = AttentionRule(128**-0.5), AttentionRule(0.06, window=4096, softcap=50.0)
    eight_billion, half_billion = AttentionShape(32, 8, 128), AttentionShape(16, 8, 128)
    bf16 = torch.bfloat16
    _attention("0.6B", half_billion, bf16, plain, QueryKeyNorm.HEAD, strict=False)
    _attention("8B strict", eight_billion, bf16, plain, QueryKeyNorm.WIDTH, strict=True)
    _attention("gemma", AttentionShape(8, 4, 256), bf16, gemma, QueryKeyNorm.HEAD, strict=False)
    sinks = AttentionRule(0.1, sinks=torch.zeros(14))
    _attention("odd", AttentionShape(14, 2, 80), torch.float16, sinks, QueryKeyNorm.HEAD, strict=False)
    _compile_instead("rows")
    kernels = TritonKernels(bf16, half_billion, Staging(CPU))
    norm = TritonRmsNorm(NormWeights(NormKind.RMS, torch.ones(4096, dtype=bf16), None, 1e-6), fuses=True)
    stream = torch.zeros(64, 4096, dtype=bf16)
    norm(stream)
    norm.add(stream, stream)
    for activation in Activation:
        kernels.pack_activation(activation, gated=True)(stream)
    for dtype in (bf16, torch.float16, torch.float32):
        _compile_instead(f"linear {dtype}")
        x, bias = torch.zeros(64, 4096, dtype=dtype), torch.zeros(6144, dtype=dtype)
        narrow, wide = (StrictLinear(torch.zeros(n, 4096, dtype=dtype), bias[:n]) for n in (1024, 6144))
        for linear in (narrow, wide, WideLinear(wide)):
            linear(x)
        wide(x.repeat(2, 1))
    _compile_instead("one row")
    row, square = stream[:1], torch.zeros(4096, 4096, dtype=bf16)
    multiply_row(row, square, None, bf16, norm)
    add_row(row, row, square, None, 1.0)
    fire_row(row, square, None, TritonActivation(Activation.SILU, gated=True, fuses=True), norm)
    for num_rows in (1, 8, 40, 100, 2048):
        _experts(bf16, num_rows, strict=False)
    _experts(bf16, 8, strict=True)
    _experts(torch.float16, 2048, strict=False)
    for num_rows in (1, 2048):
        _experts(torch.float32, num_rows, strict=False)
    _compile_instead("vocabulary")
    draw(torch.zeros(2, 151_936), torch.zeros(2, WORDS, dtype=torch.int64), adjusted=False)
    insert(torch.zeros(300, dtype=torch.int32), torch.zeros(64, dtype=torch.int32))


if __name__ == "__main__":
    main()
