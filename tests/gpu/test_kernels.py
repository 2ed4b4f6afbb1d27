"""The compiled kernels on a GPU, against the reference in float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pawl_workers.kernels import choose_backend
from pawl_workers.kernels.reference import ReferenceActivation, ReferenceKernels, ReferenceNorm
from pawl_workers.kernels.routing import choose_experts
from pawl_workers.kernels.torch_sampler import TorchSampler
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.triton.route import choose
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.kernels.triton.sampler import TritonSampler
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind
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


def _experts(
    num_experts: int, active: int, hidden: int, inner: int, dtype: torch.dtype, *, strict: bool = False
) -> TritonExperts:
    generator = torch.Generator().manual_seed(num_experts)
    up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) * inner**-0.5
    activation = TritonActivation(Activation.SILU, gated=True, fuses=not strict)
    return TritonExperts(up.to("cuda", dtype), activation, down.to("cuda", dtype), active, True, strict)


EXPERT_SHAPES = [(128, 8, 512, 192), (8, 2, 1000, 328), (60, 4, 260, 44)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_experts_equal_the_reference(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Every tile of rows, and the kernels of a single one; also with all tokens at the same experts."""
    num_experts, active, hidden, _ = shape
    experts = _experts(*shape, dtype)
    generator = torch.Generator().manual_seed(1)
    for num_rows in (1, 2, 16, 100, 300, 2000):
        x = torch.randn(num_rows, hidden, generator=generator).to(dtype)
        scores = (torch.randn(num_rows, num_experts, generator=generator).argsort(dim=-1) / 8).to(dtype)
        if num_rows == 100:
            scores = scores[:1].repeat(num_rows, 1)
        found = experts(x.cuda(), scores.cuda()).cpu().double()
        shares, chosen = scores.float().softmax(dim=-1).topk(active, dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        wanted = torch.zeros(num_rows, hidden, dtype=torch.float64)
        for number in range(num_experts):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            gate, up = (x[tokens].double() @ experts.up[number].cpu().double().T).chunk(2, dim=-1)
            fired = (gate * gate.sigmoid() * up) @ experts.down[number].cpu().double().T
            wanted[tokens] += fired * shares[tokens, place].unsqueeze(1)
        assert (found - wanted).abs().max() < TOLERANCES[dtype] * max(1.0, float(wanted.abs().max())), num_rows


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_strict_experts_give_a_row_the_same_bits_in_any_batch(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    experts = _experts(*shape, dtype, strict=True)
    generator = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(1500, shape[2], device="cuda", generator=generator, dtype=dtype)
    scores = torch.randn(1500, shape[0], device="cuda", generator=generator, dtype=dtype)
    whole = experts(x, scores)
    for rows in ([0], [7], [1499, 3], list(range(16)), list(range(40, 140)), list(range(1500))[::-1]):
        assert torch.equal(experts(x[rows], scores[rows]), whole[rows]), len(rows)


@pytest.mark.parametrize("num_experts", [8, 60, 128])
def test_equal_experts_are_chosen_as_torch_chooses_on_the_device(num_experts: int) -> None:
    """Scores of bf16, many of which are alike: the same experts, and shares but for rounding."""
    generator = torch.Generator("cuda").manual_seed(3)
    scores = (torch.randn(4000, num_experts, device="cuda", generator=generator) * 4).round().div(4).bfloat16()
    shares, chosen = choose(scores, 8, normalised=True, fuses=True)
    wanted_shares, wanted = choose_experts(scores, 8, normalised=True)
    order = wanted.argsort(dim=-1)
    assert torch.equal(chosen.long(), wanted.gather(1, order))
    assert torch.allclose(shares, wanted_shares.gather(1, order), rtol=1e-5, atol=0)


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
