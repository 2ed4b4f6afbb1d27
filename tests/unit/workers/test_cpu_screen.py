"""Greedy tokens without all logits: always those that all logits give, and by bounds that hold."""

from __future__ import annotations

from itertools import chain, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.kernels.byte_weights import ByteScales
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.cpu_screen import CpuHead
from pawl_workers.kernels.native import build, library
from tests.fakes.screened import Screened, choose_tokens
from tests.fakes.threads import compute_threads

TYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "outliers", "near ties", "ties", "zeros", "tiny", "huge", "scales")
ALTERNATIVES = tuple(dict.fromkeys(chain(*build._LEVELS.values())))


pytestmark = pytest.mark.usefixtures("without_tiles")


def _head(weight: Tensor) -> CpuHead:
    head = CpuKernels().pack_head(weight, None)
    assert isinstance(head, CpuHead)
    assert head.screen is not None
    return head


def _draw(kind: str, shape: tuple[int, int], num_rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights, [V, D], and rows, [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, shape[1], generator=generator) for n in (shape[0], num_rows))
    match kind:
        case "outliers":
            x[:, 0] *= 300.0
            weight[:, -1] *= 50.0
        case "near ties":
            weight = weight[:1] + 1e-3 * weight
        case "ties":
            weight = weight[torch.randint(0, 3, (shape[0],), generator=generator) % shape[0]]
        case "zeros":
            x[::2], weight[::3] = 0.0, 0.0
        case "tiny":
            x, weight = x * 1e-12, weight * 1e-4
        case "huge":
            x, weight = x * 1e13, weight * 1e3
        case "scales":
            weight = (weight * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))).clamp(-6e4, 6e4)  # as fp16
            x *= torch.exp(3 * torch.randn(num_rows, 1, generator=generator))
    return weight.to(dtype).float(), x


def _hold(screened: Screened, logits: Tensor) -> None:
    """Bounds of rows that have them, against logits that were computed otherwise, [T, V]."""
    sure, missing = ~screened.doubtful, -logits.shape[1] % (2 * library.load_library().panel_width)
    pairs = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    highest = pairs.view(len(logits), screened.ceilings.shape[1], -1).amax(dim=2).numpy()
    assert (screened.ceilings[sure] >= highest[sure]).all()
    assert (screened.floors[sure] <= logits.numpy()[sure].max(axis=1)).all()


@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(1, 150),
    inputs=st.integers(1, 90),
    num_rows=st.integers(1, 40),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
    num_threads=st.sampled_from([1, 2, 3]),
)
@example("scales", 12, 68, 1, torch.float16, 191, 1)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_token_is_the_one_that_all_logits_give(
    kind: str, vocab_size: int, inputs: int, num_rows: int, dtype: torch.dtype, seed: int, num_threads: int
) -> None:
    weight, x = _draw(kind, (vocab_size, inputs), num_rows, seed, dtype)
    head = _head(weight)
    logits = head(x)
    screened = choose_tokens(head, x, num_threads)
    assert screened.token_ids.tolist() == logits.argmax(dim=1).tolist()  # the lowest id among equals
    assert kind == "tiny" or not screened.doubtful.any()
    _hold(screened, logits)
    _hold(screened, (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("flags", ALTERNATIVES, ids="".join)
def test_every_set_of_instructions_gives_them(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", "amx")
    best = build.instruction_flags()
    if not set(flags) <= set(best) or "-mamx-tile" in flags:
        pytest.skip("this processor has others, or its matrix tiles need no screen")
    monkeypatch.setattr(library, "find_or_build", lambda: build._find_or_build(build._compiler(), flags))
    library.load_library.cache_clear()
    for kind, shape in product(KINDS, [(700, 130), (90, 3001)]):
        weight, x = _draw(kind, shape, 29, 5, torch.bfloat16)
        head = _head(weight)
        screened = choose_tokens(head, x, 2)
        assert screened.token_ids.tolist() == head(x).argmax(dim=1).tolist()
        _hold(screened, head(x))


def test_few_logits_are_computed() -> None:
    weight, x = _draw("normal", (8192, 256), 32, 1, torch.bfloat16)
    screened = choose_tokens(_head(weight), x)
    may_hold_the_best = (screened.ceilings >= screened.floors[:, None]).mean()
    assert 0 < may_hold_the_best < 1 / 10


def test_a_row_that_is_not_finite_fails_alone() -> None:
    weight, x = _draw("normal", (100, 40), 6, 2, torch.bfloat16)
    x[1, 3], x[4, 39] = torch.nan, -torch.inf
    head = _head(weight)
    screened = choose_tokens(head, x, 2)
    expected = head(x).argmax(dim=1)
    expected[[1, 4]] = -1
    assert screened.token_ids.tolist() == expected.tolist()


def test_rows_out_of_bounds_have_all_logits_computed() -> None:
    weight, x = _draw("normal", (100, 40), 4, 3, torch.float32)
    x[1] *= 1e20
    x[2] *= 1e-30
    head = _head(weight)
    screened = choose_tokens(head, x)
    assert screened.doubtful.tolist() == [False, True, True, False]
    assert screened.token_ids.tolist() == head(x).argmax(dim=1).tolist()
    x[1] = 3e38  # and its logits are not finite
    assert choose_tokens(head, x).token_ids[1] == -1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e16])
def test_a_weight_out_of_bounds_leaves_the_head_without_a_screen(value: float) -> None:
    weight = torch.ones(40, 8)
    weight[39, 7] = value
    head = CpuKernels().pack_head(weight, None)
    assert isinstance(head, CpuHead)
    assert head.screen is None


def test_heads_that_cannot_have_one() -> None:
    weight = torch.ones(40, 8)
    assert not isinstance(CpuKernels().pack_head(weight, torch.ones(40)), CpuHead)
    assert not isinstance(CpuKernels(byte_scales=ByteScales()).pack_head(weight, None), CpuHead)
    assert not isinstance(CpuKernels(screens=False).pack_head(weight, None), CpuHead)


@pytest.mark.parametrize("screens", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (1000, 48), (65, 130)])
def test_a_head_takes_what_is_foretold(shape: tuple[int, int], screens: bool) -> None:
    kernels = CpuKernels(screens=screens)
    head = kernels.pack_head(torch.ones(shape).bfloat16(), None)
    assert head.num_bytes == kernels.packed_head_bytes(shape, torch.bfloat16, torch.float32)
    without = kernels.packed_bytes(shape, torch.bfloat16, torch.float32)
    assert (head.num_bytes > without) == screens


def test_bounds_that_are_too_narrow_are_seen() -> None:
    """Without what was rounded off, tokens come out that are not the best: the tests above can fail."""
    weight, x = _draw("near ties", (2000, 64), 64, 4, torch.float32)
    head = _head(weight)
    assert head.screen is not None
    head.screen._columns.view(-1, 3, library.load_library().panel_width)[:, 1:] = 0.0
    expected = head(x).argmax(dim=1).numpy()
    assert (choose_tokens(head, x).token_ids != expected).mean() > 0.3


def test_no_bits_depend_on_threads_or_rows() -> None:
    weight, x = _draw("near ties", (3000, 64), 50, 6, torch.bfloat16)
    head = _head(weight)
    alone = np.concatenate([choose_tokens(head, row).token_ids for row in x.unsqueeze(1)])
    with compute_threads(3):
        assert choose_tokens(head, x, 3).token_ids.tolist() == alone.tolist()
