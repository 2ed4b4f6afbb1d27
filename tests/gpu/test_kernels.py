"""The compiled kernels on a GPU, against the reference in float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pawl_workers.kernels import choose_backend
from pawl_workers.kernels.reference import ReferenceActivation, ReferenceKernels, ReferenceNorm
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.kernels.triton.sampler import TritonSampler
from pawl_workers.model.spec import Activation, NormKind
from pawl_workers.model.weights import NormWeights
from pawl_workers.plan import SamplingSpec
from pawl_workers.sampling.batch import SamplingBatch
from pawl_workers.sampling.table import SamplingTable
from tests.fakes.attention_cases import AttentionCase, attention_cases, run_case

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 4e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
CASES = attention_cases(head_dims=(16, 40, 64, 80, 128, 256), groups=(1, 2, 3, 7, 8, 17), most_new=200)
shared_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("dtype", TOLERANCES)
@given(case=CASES)
@settings(shared_fixtures, max_examples=60)
def test_attention_equals_the_reference(cuda: torch.device, dtype: torch.dtype, case: AttentionCase) -> None:
    kernels = choose_backend(cuda, dtype, case.shape, "triton")
    wanted = run_case(ReferenceKernels(torch.device("cpu")), case)
    for found, rows in zip(run_case(kernels, case, device=cuda, dtype=dtype), wanted, strict=True):
        error = (found.cpu() - rows).abs()
        # Keys are rounded to 16 bits as they are written, which may turn which of two near ones a sharp softmax takes.
        assert error.mean() < TOLERANCES[dtype] * rows.abs().mean()
        assert error.max() < 10 * TOLERANCES[dtype] * max(1.0, float(rows.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@given(case=CASES)
@settings(shared_fixtures, max_examples=40)
def test_strict_attention_has_the_same_bits_in_any_chunks(
    cuda: torch.device, dtype: torch.dtype, case: AttentionCase
) -> None:
    """Together, token by token, and every sequence by itself."""
    kernels = choose_backend(cuda, dtype, case.shape, "triton", strict=True)

    def run(parts: list[list[tuple[int, int, int]]] | None) -> list[torch.Tensor]:
        return run_case(kernels, case, device=cuda, dtype=dtype, parts=parts)

    together = run(None)
    ranges = [(i, before, before + new) for i, (before, new) in enumerate(case.sequences)]
    single = [
        [(i, at, at + 1) for i, begin, end in ranges for at in [begin + step] if at < end]
        for step in range(min(20, max(end - begin for _, begin, end in ranges)))
    ]
    for found, wanted in zip(run(single), together, strict=True):
        assert torch.equal(found, wanted[: len(found)])
    for found, wanted in zip(run([[one] for one in ranges]), together, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_equal_the_reference(cuda: torch.device, dtype: torch.dtype) -> None:
    x, update = (torch.randn(70, 4096, device=cuda, dtype=dtype) for _ in range(2))
    w = NormWeights(NormKind.RMS, torch.randn(4096, device=cuda, dtype=dtype), None, 1e-5)
    norm, stream = TritonRmsNorm(w, fuses=True), x.clone()
    error = TOLERANCES[dtype]
    assert torch.allclose(norm(x), ReferenceNorm(w)(x), rtol=error, atol=error)
    normed = norm.add(stream, update, 0.5)
    assert torch.allclose(normed, ReferenceNorm(w)(stream), rtol=error, atol=error)
    for rows in (1, 3, 64):
        assert torch.equal(norm(x[:rows]), norm(x)[:rows])
    for activation in Activation:
        wanted = ReferenceActivation(activation, gated=True)(x.clone())
        assert torch.allclose(TritonActivation(activation, gated=True, fuses=True)(x), wanted, rtol=error, atol=error)


@given(seed=st.integers(0, 2**64 - 1), top_k=st.sampled_from([0, 1, 50, 5000]), top_p=st.sampled_from([1.0, 0.9, 0.1]))
@settings(shared_fixtures, max_examples=30)
def test_draws_are_those_of_the_torch_sampler(cuda: torch.device, seed: int, top_k: int, top_p: float) -> None:
    """A whole vocabulary; the two round differently, so a draw may fall to a neighbour where the noise is near."""
    num, table = 8, SamplingTable(8)
    for row in range(num):
        temperature = 0.0 if row == 0 else 0.3 * row
        spec = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.001 * row, seed=seed + row)
        table.add(row, spec, [1], [])
    generator = torch.Generator(cuda).manual_seed(seed % 2**31)
    scores = torch.randn(num, 151_936, device=cuda, generator=generator) * 2
    rows, drafts = np.arange(num), np.zeros((num, 0), dtype=np.int64)
    found, wanted = (
        sampler.choose(scores, SamplingBatch(sampler, table, rows, rows + 3, rows, drafts))
        for sampler in (TritonSampler(), TorchSampler())
    )
    assert found[0] == wanted[0]
    assert (found == wanted).sum() >= num - 1
    again = TritonSampler().choose(scores, SamplingBatch(TritonSampler(), table, rows, rows + 3, rows, drafts))
    assert (again == found).all()
