"""Routing on the device: which experts a token goes to, and which tokens an expert computes, in tiles.

No number of tokens comes to the host. Shapes follow from the number of rows alone: of tiles there is room for the most
that there can be, and how many there are is written beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Arrangement", "arrange", "choose"]

_WARP = 32  # threads: no vector of a program is shorter
_CHUNKS = ((128, 1), (1024, 4), (4096, 8))
"""Pairs that a program looks at in one go, and its warps."""


@triton.jit
def _choose(
    scores: tl.tensor,
    shares: tl.tensor,
    chosen: tl.tensor,
    EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    x = tl.load(scores + row * EXPERTS + lanes, mask=lanes < EXPERTS, other=float("-inf")).to(tl.float32)
    share = tl.exp(x - tl.max(x, 0))
    total = tl.sum(share, 0)
    # What is not a number ranks last: as many experts are chosen of any row, and all its shares are not a number then.
    ranked = tl.where(share >= 0, share / total, 0.0)
    ranked = tl.where(ranked >= 0, ranked, 0.0)
    # Shares are not negative: their bits order as they do. Of equal ones the lowest number is first.
    keys = (ranked.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (WIDTH - 1 - lanes).to(tl.int64)
    keys = tl.where(lanes < EXPERTS, keys, -1)
    is_chosen = tl.zeros((WIDTH,), tl.int32)
    for _ in range(ACTIVE):
        best = keys == tl.max(keys, 0)
        is_chosen = tl.where(best, 1, is_chosen)
        keys = tl.where(best, -1, keys)
    share = share / total
    if NORMALISED:
        share = share / tl.sum(tl.where(is_chosen > 0, share, 0.0), 0)
    at = row * ACTIVE + tl.cumsum(is_chosen, 0) - 1
    tl.store(chosen + at, lanes, mask=is_chosen > 0)
    tl.store(shares + at, share, mask=is_chosen > 0)


def choose(scores: Tensor, num_active: int, *, normalised: bool, fuses: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts that a router scores highest; `choose_experts` in one kernel, and in another order.

    Of experts of equal shares those of the lowest numbers are chosen, as `topk` of torch does on CUDA.

    Args:
        scores: of each expert, [T, E].
        num_active: experts of a token.
        normalised: whether the shares of a token add up to 1.
        fuses: the compiler may fuse a product and a sum into one rounding.

    Returns:
        Shares, float32, and experts, int32, both [T, num_active], in the order of the experts' numbers.
    """
    scores = scores.contiguous()
    num_rows, num_experts = scores.shape
    shares = torch.empty(num_rows, num_active, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(num_rows, num_active, dtype=torch.int32, device=scores.device)
    _choose[(num_rows,)](
        scores, shares, chosen,
        EXPERTS=num_experts, ACTIVE=num_active, WIDTH=max(triton.next_power_of_2(num_experts), _WARP),
        NORMALISED=normalised, num_warps=1, enable_fp_fusion=fuses,
    )  # fmt: skip
    return shares, chosen


@triton.jit(do_not_specialize=["num_pairs"])
def _arrange(
    chosen: tl.tensor,
    tiles: tl.tensor,
    order: tl.tensor,
    num_pairs: tl.tensor,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for base in range(0, num_pairs, CHUNK):
        counts += tl.histogram(tl.load(chosen + base + lanes, mask=base + lanes < num_pairs, other=EXPERTS), BINS)
    bins = tl.arange(0, BINS)
    needed = tl.where(bins < EXPERTS, (counts + ROWS - 1) // ROWS, 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    first = tl.sum(tl.where(bins < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(bins < expert, needed, 0), 0)
    if expert == 0:
        tl.store(tiles, tl.sum(needed, 0))
    for done in range(0, count, ROWS):
        at = tiles + 4 * (1 + first_tile + done // ROWS)
        tl.store(at, expert)
        tl.store(at + 1, first + done)
        tl.store(at + 2, tl.minimum(count - done, ROWS))
    if count > 0:
        before = first
        for base in range(0, num_pairs, CHUNK):
            at = base + lanes
            mine = tl.load(chosen + at, mask=at < num_pairs, other=EXPERTS) == expert
            places = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order + before + places - 1, at, mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Pairs of a token and an expert, in tiles of one expert each; a pair's number is token * num_active + place.

    Attributes:
        tiles: int32, [1 + most_tiles, 4]: how many there are, then of each its expert, where its pairs begin in
            `order`, and how many they are.
        order: the pairs by their expert, int32, [pairs].
        most_tiles: of so many pairs, whichever experts they have.
    """

    tiles: Tensor
    order: Tensor
    most_tiles: int


def arrange(chosen: Tensor, num_experts: int, rows: int) -> Arrangement:
    """Sort pairs by their expert, and cut those of each into tiles of `rows`; `chosen` is int32, [T, num_active].

    The sort is stable; an expert's program counts all pairs and places its own.
    """
    num_pairs = chosen.numel()
    most_tiles = (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows
    tiles = torch.empty(1 + most_tiles, 4, dtype=torch.int32, device=chosen.device)
    order = torch.empty(num_pairs, dtype=torch.int32, device=chosen.device)
    chunk, warps = next((each for each in _CHUNKS if num_pairs <= each[0]), _CHUNKS[-1])
    _arrange[(num_experts,)](
        chosen, tiles, order, num_pairs,
        ROWS=rows, EXPERTS=num_experts, BINS=max(triton.next_power_of_2(num_experts + 1), _WARP), CHUNK=chunk,
        num_warps=warps,
    )  # fmt: skip
    return Arrangement(tiles, order, most_tiles)
