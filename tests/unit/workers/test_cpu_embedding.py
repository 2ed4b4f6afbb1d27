"""The embedding as an operation of a compiled program: the bits of the stage."""

from __future__ import annotations

import ctypes
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.batch import Batch
from pawl_workers.kernels.cpu_compile import compile_embedding
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.native.structures import Frame, Operation, Progress
from pawl_workers.model.weights import EmbeddingWeights
from pawl_workers.stages.embed import embed

VOCABULARY, LONGEST = 50, 40


class Tokens:
    """What the stage reads of a batch."""

    def __init__(self, token_ids: Tensor, positions: Tensor) -> None:
        self.token_ids, self.positions = token_ids, positions


def run(operation: Operation, tokens: Tokens, width: int, num_threads: int) -> Tensor:
    """Run one operation over a stream of its own."""
    stream, progress = torch.full((len(tokens.token_ids), width), torch.nan), (Progress * 1)()
    frame = Frame(
        token_ids=tokens.token_ids.data_ptr(), positions=tokens.positions.data_ptr(),
        progress=ctypes.addressof(progress), rows=len(stream),
    )  # fmt: skip
    frame.buffers[0] = stream.data_ptr()
    load_library().run((Operation * 1)(operation), 1, ctypes.addressof(frame), num_threads)
    return stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(
    width=st.sampled_from([1, 7, 8, 24, 33, 576]), num_rows=st.integers(1, 150), learned=st.booleans(),
    scale=st.sampled_from([1.0, 2.5, 33.94]), num_threads=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_vectors_have_the_bits_of_the_stage(
    dtype: torch.dtype, width: int, num_rows: int, scale: float, learned: bool, num_threads: int, seed: int
) -> None:
    """Of every type, subnormal ones too; scaled, and with positions that are learned."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(VOCABULARY, width, generator=generator) * 10.0 ** torch.randint(
        -6, 3, (VOCABULARY, 1), generator=generator
    )
    positions = torch.randn(LONGEST, width, generator=generator) if learned else None
    w = EmbeddingWeights(vectors.to(dtype), positions, torch.float32, scale)
    tokens = Tokens(
        torch.randint(VOCABULARY, (num_rows,), generator=generator),
        torch.randint(LONGEST, (num_rows,), generator=generator),
    )
    found = run(compile_embedding(w), tokens, width, num_threads)
    assert torch.equal(found.view(torch.int32), embed(cast("Batch", tokens), w).view(torch.int32))
