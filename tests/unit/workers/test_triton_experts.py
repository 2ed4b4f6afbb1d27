"""Routed experts of the triton backend, in the interpreter: against the reference, expert by expert, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.kernels.reference import ReferenceActivation, ReferenceLinear
from pawl_workers.kernels.triton.experts import TritonExperts
from pawl_workers.kernels.triton.route import arrange, choose
from pawl_workers.kernels.triton.rows import TritonActivation, TritonRmsNorm
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind
from pawl_workers.model.weights import ExpertWeights, MlpWeights
from pawl_workers.stages.mlp import mlp

BOUNDED = (Phase.explicit, Phase.reuse, Phase.generate)


@dataclass(frozen=True)
class Case:
    """A routed layer and its input: `favoured` experts draw all tokens, None = as it comes."""

    num_rows: int
    num_experts: int
    num_active: int
    hidden: int
    inner: int
    activation: Activation
    gated: bool
    normalised: bool
    favoured: int | None
    seed: int

    def drawn(self, place: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + place)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, scores, and weights of up and down."""
        width = self.inner * (2 if self.gated else 1)
        # No two alike in 16 bits: of equal experts torch's topk takes others on a CPU.
        scores = self.drawn(1, self.num_rows, self.num_experts).argsort(dim=-1) / 8
        if self.favoured is not None:
            scores[:, self.favoured :: 7] += 20.0
        up = self.drawn(2, self.num_experts, width, self.hidden) * self.hidden**-0.5
        down = self.drawn(3, self.num_experts, self.hidden, self.inner) * self.inner**-0.5
        return (
            self.drawn(0, self.num_rows, self.hidden).to(dtype),
            scores.to(dtype),
            up.to(dtype),
            down.to(dtype),
        )

    def experts(self, dtype: torch.dtype, *, strict: bool = False) -> TritonExperts:
        _, _, up, down = self.tensors(dtype)
        activation = TritonActivation(self.activation, self.gated, fuses=not strict)
        return TritonExperts(up, activation, down, self.num_active, self.normalised, strict)

    def wanted(self, dtype: torch.dtype) -> Tensor:
        """What the stage gives that asks which experts are chosen, on the same numbers, in float64."""
        x, scores, up, down = (tensor.double() for tensor in self.tensors(dtype))
        activate = ReferenceActivation(self.activation, self.gated)
        experts = tuple(
            MlpWeights(
                ReferenceLinear(up[e], None), activate, ReferenceLinear(down[e], None), self.activation, self.gated
            )
            for e in range(self.num_experts)
        )
        given = ExpertWeights(_Given(scores), experts, self.num_active, self.normalised)
        return mlp(x, given)


class _Given(ReferenceLinear):
    """A router whose scores are known."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__(scores, None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 40))
    return Case(
        num_rows=draw(st.sampled_from([1, 1, 2, 3, 17, 60])),
        num_experts=num_experts,
        num_active=draw(st.integers(1, min(num_experts, 8))),
        hidden=draw(st.sampled_from([5, 24, 64, 130])),
        inner=draw(st.sampled_from([3, 16, 48, 70])),
        activation=draw(st.sampled_from(Activation)),
        gated=draw(st.booleans()),
        normalised=draw(st.booleans()),
        favoured=draw(st.none() | st.integers(0, num_experts - 1)),
        seed=draw(st.integers(0, 1 << 30)),
    )


@settings(max_examples=25, phases=BOUNDED, deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_experts_together_give_what_they_give_one_by_one(case: Case, dtype: torch.dtype) -> None:
    """Any sizes; experts without tokens, and those that all tokens go to."""
    x, scores, _, _ = case.tensors(dtype)
    found = case.experts(dtype)(x, scores)
    wanted = case.wanted(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert found.dtype is dtype
    assert (found.double() - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.usefixtures("rows_alike")
@settings(max_examples=10, phases=BOUNDED, deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float16]), data=st.data())
def test_strict_rows_have_the_same_bits_in_any_batch(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    x, scores, _, _ = case.tensors(dtype)
    experts = case.experts(dtype, strict=True)
    whole = experts(x, scores)
    assert (whole.double() - case.wanted(dtype)).abs().max() < (1e-4 if dtype is torch.float32 else 5e-2)
    rows = data.draw(st.lists(st.integers(0, case.num_rows - 1), min_size=1, max_size=5))
    assert torch.equal(experts(x[rows], scores[rows]), whole[rows])


@pytest.mark.parametrize("tokens_of_expert", [8, 16, 32, 70])
def test_every_tile_of_rows(tokens_of_expert: int) -> None:
    """As many tokens as make each size of tile, in half precision, with depths that fill a tile and that do not."""
    for hidden, inner in ((128, 64), (72, 40)):
        case = Case(2 * tokens_of_expert, 2, 1, hidden, inner, Activation.SILU, True, False, None, seed=5)
        x, scores, _, _ = case.tensors(torch.float16)
        error = case.experts(torch.float16)(x, scores).double() - case.wanted(torch.float16)
        assert error.abs().max() < 2e-2


def test_a_single_row_is_normalised_and_added() -> None:
    case = Case(1, 9, 4, 72, 40, Activation.GELU_TANH, True, True, None, seed=6)
    x, scores, _, _ = case.tensors(torch.float16)
    norm = TritonRmsNorm(NormWeights(NormKind.RMS, 1 + 0.1 * x[0].abs(), None, 1e-5), fuses=True)
    experts = case.experts(torch.float16)
    wanted = x + 0.5 * experts(norm(x), scores)
    stream = x.clone()
    assert experts.add_row(stream, scores, 0.5, norm) is stream
    assert (stream - wanted).abs().max() < 1e-2


def test_no_rows_give_none() -> None:
    case = Case(3, 4, 2, 24, 16, Activation.SILU, True, True, None, seed=7)
    x, scores, _, _ = case.tensors(torch.float32)
    assert case.experts(torch.float32)(x[:0], scores[:0]).shape == (0, 24)


@settings(max_examples=30, phases=BOUNDED, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    num_experts=st.sampled_from([1, 3, 8, 60, 128]),
    values=st.integers(1, 40),
    normalised=st.booleans(),
    data=st.data(),
)
def test_of_equal_experts_the_lowest_numbers_are_chosen(
    num_rows: int, num_experts: int, values: int, normalised: bool, data: st.DataObject
) -> None:
    """Scores of few different values, against a stable sort; shares of a token by torch's own softmax."""
    num_active = data.draw(st.integers(1, min(num_experts, 8)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    scores = torch.randint(0, values, (num_rows, num_experts), generator=generator) / 4
    shares, chosen = choose(scores, num_active, normalised=normalised, fuses=True)
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :num_active].sort(dim=-1).values
    assert torch.equal(chosen.long(), order)
    wanted = scores.softmax(dim=-1).gather(1, order)
    if normalised:
        wanted = wanted / wanted.sum(dim=-1, keepdim=True)
    assert torch.allclose(shares, wanted, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_rows_that_are_not_finite_choose_experts_that_exist_and_spoil_no_other() -> None:
    case = Case(5, 6, 3, 24, 16, Activation.SILU, True, True, None, seed=8)
    x, scores, _, _ = case.tensors(torch.float32)
    experts = case.experts(torch.float32)
    sound = experts(x, scores)
    for row, value in ((1, float("nan")), (3, float("inf"))):
        scores[row, row:] = value
        x[row] = value
    _, chosen = choose(scores, 3, normalised=True, fuses=True)
    assert ((chosen >= 0) & (chosen < 6)).all()
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    spoiled = experts(x, scores)
    assert torch.equal(spoiled[[0, 2, 4]], sound[[0, 2, 4]])
    assert not spoiled[[1, 3]].isfinite().any()


@settings(max_examples=15, phases=BOUNDED, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 7, 130, 600, 2500]),
    num_experts=st.sampled_from([1, 5, 64, 130]),
    rows=st.sampled_from([16, 64]),
    data=st.data(),
)
def test_tiles_hold_every_pair_once_by_its_expert(
    num_rows: int, num_experts: int, rows: int, data: st.DataObject
) -> None:
    """Also over more pairs than are looked at in one go; there is room for all tiles, whatever is drawn."""
    num_active = data.draw(st.integers(1, min(num_experts, 4)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    spread = data.draw(st.integers(num_active, num_experts))
    chosen = torch.stack([torch.randperm(spread, generator=generator)[:num_active] for _ in range(num_rows)]).int()
    found = arrange(chosen, num_experts, rows)
    num_tiles = int(found.tiles[0, 0])
    assert num_tiles <= found.most_tiles == len(found.tiles) - 1
    order, flat = found.order.long(), chosen.flatten()
    assert torch.equal(order, flat.argsort(stable=True))
    covered = 0
    for expert, begin, count, _ in found.tiles[1 : 1 + num_tiles].tolist():
        assert begin == covered
        assert 0 < count <= rows
        assert (flat[order[begin : begin + count]] == expert).all()
        covered += count
    assert covered == len(flat)
    assert num_tiles == sum(-(-count // rows) for count in flat.bincount().tolist() if count)
