"""A token is drawn from each row of logits, without sorting it.

A row is one program. It looks once for the best logit; filters then need the tokens near it, which are gathered in the
order of their ids, and thresholds on them are found bit by bit: of a tempered logit's distance from the best, whose
bits order like the distance itself. Sums run in float64 in an order that the vocabulary fixes, so a row's token depends
on its logits, its parameters and its noise alone.

Source: the pivots are those of Qrita (arXiv 2602.01518), made exact; noise is Philox4x32-10 (Salmon et al., SC 2011).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pawl_workers.sampling.batch import NOT_FINITE, NOTHING_LEFT

__all__ = ["draw"]

_BLOCK = 4096


@triton.jit
def _near(
    values: tl.tensor, base: tl.tensor, size: tl.tensor, best: tl.tensor, divisor: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Positions `base` to `base + BLOCK`: which exist, their distance from the best as ordered bits, their weight."""
    at = base + tl.arange(0, BLOCK)
    exists = at < size
    x = tl.load(values + at, mask=exists, other=float("-inf"))
    distance = tl.abs(tl.div_rn(x - best, divisor))
    return exists & (x > float("-inf")), distance.to(tl.int32, bitcast=True), tl.exp(-distance).to(tl.float64)


@triton.jit
def _below(
    values: tl.tensor, size: tl.tensor, best: tl.tensor, divisor: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How many tokens are nearer to the best than `limit`, and their weight."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    for base in range(0, size, BLOCK):
        exists, bits, weight = _near(values, base, size, best, divisor, BLOCK)
        nearer = exists & (bits < limit)
        count += nearer.to(tl.int32)
        mass += tl.where(nearer, weight, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The number in [0, 1) of a seed and a position: the 53 high bits of the first two words."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return (((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _draw(
    scores: tl.tensor,
    words: tl.tensor,
    chosen: tl.tensor,
    near_values: tl.tensor,
    near_ids: tl.tensor,
    size: tl.tensor,
    ADJUSTED: tl.constexpr,
    BLOCK: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NOTHING_LEFT: tl.constexpr,
) -> None:
    sample = tl.program_id(0).to(tl.int64)
    row = scores + sample * size
    lanes = tl.arange(0, BLOCK)
    bests = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for base in range(0, size, BLOCK):
        at = base + lanes
        x = tl.load(row + at, mask=at < size, other=float("-inf"))
        ids = tl.where(x > bests, at, ids)
        bests = tl.where(x > bests, x, bests)
        bad = ~(x < float("inf"))  # or not a number
        if not ADJUSTED:
            bad = bad | ((x == float("-inf")) & (at < size))
        broken += bad.to(tl.int32)
    best = tl.max(bests, 0)
    token = tl.min(tl.where(bests == best, ids, 2147483647), 0)
    own = words + sample * 6
    temperature = tl.load(own).to(tl.float64, bitcast=True)
    if tl.sum(broken, 0) > 0:
        token = token * 0 + NOT_FINITE
    elif best == float("-inf"):
        token = token * 0 + NOTHING_LEFT
    elif temperature > 0:
        top_p = tl.load(own + 1).to(tl.float64, bitcast=True)
        min_p = tl.load(own + 2).to(tl.float64, bitcast=True)
        top_k = tl.load(own + 3)
        noise = _uniform(tl.load(own + 4), tl.load(own + 5))
        divisor = tl.maximum(temperature, 1e-30).to(tl.float32)
        limits_k = (top_k > 0) & (top_k < size)
        token = _choose(
            row, near_values + sample * BLOCK, near_ids + sample * BLOCK, size, best, divisor,
            limits_k, top_k.to(tl.int32), top_p, min_p, noise, BLOCK,
        )  # fmt: skip
    tl.store(chosen + sample, token)


@triton.jit
def _choose(
    row: tl.tensor,
    near_values: tl.tensor,
    near_ids: tl.tensor,
    size: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    limits_k: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    noise: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    values = row
    num_values = size
    gathered = False
    farthest = 2139095040  # the bits of infinity: everything is kept
    quota = size
    if limits_k | (top_p < 1.0) | (min_p > 0.0):
        # The nearest of three level sets that is sure to hold all that the filters keep, if it fits into a block.
        counts, masses, total = _level_sets(row, size, best, divisor, BLOCK)
        level = tl.zeros((), tl.int32)
        num_level = size
        for i in tl.static_range(3):
            tried = tl.full((), 16, tl.int32) >> i
            count = tl.sum(tl.where(tl.arange(0, 4) == i, counts, 0), 0)
            mass = tl.sum(tl.where(tl.arange(0, 4) == i, masses, 0.0), 0)
            enough = min_p >= tl.exp(-tried.to(tl.float32))
            if limits_k:
                enough = count >= top_k
            elif top_p < 1.0:
                enough = mass > top_p * total
            if enough & (count <= BLOCK):
                level = tried
                num_level = count
        if level > 0:
            _gather(row, near_values, near_ids, size, best, divisor, level, BLOCK)
            tl.debug_barrier()
            values = near_values
            num_values = num_level
            gathered = True
        if limits_k:
            # The least distance within which there are k tokens, built from its highest bit.
            below = tl.zeros((), tl.int32)
            for bit in range(30, -1, -1):
                middle = below + (1 << bit)
                count, _ = _below(values, num_values, best, divisor, middle, BLOCK)
                below = tl.where(count < top_k, middle, below)
            farthest = below
            count, mass = _below(values, num_values, best, divisor, farthest, BLOCK)
            quota = top_k - count
            total = mass + quota * tl.exp(-(below.to(tl.float32, bitcast=True))).to(tl.float64)
        if top_p < 1.0:
            # The greatest distance such that the tokens nearer than it do not reach the mass.
            reach = top_p * total
            below = tl.zeros((), tl.int32)
            for bit in range(30, -1, -1):
                middle = below + (1 << bit)
                _, mass = _below(values, num_values, best, divisor, middle, BLOCK)
                below = tl.where((middle <= farthest) & (mass < reach), middle, below)
            _, mass = _below(values, num_values, best, divisor, below, BLOCK)
            weight = tl.exp(-(below.to(tl.float32, bitcast=True))).to(tl.float64)
            ties = tl.ceil(tl.minimum((reach - mass) / tl.maximum(weight, 1e-300), size.to(tl.float64))).to(tl.int32)
            ties = tl.maximum(ties, 1)  # the best is always kept
            quota = tl.where(below == farthest, tl.minimum(quota, ties), ties)
            farthest = below
    mass, _, last = _scan(values, num_values, best, divisor, farthest, quota, min_p, float("inf"), BLOCK)
    _, found, _ = _scan(values, num_values, best, divisor, farthest, quota, min_p, noise * mass, BLOCK)
    found = tl.where(found < num_values, found, last)
    if gathered:
        found = tl.load(near_ids + found)
    return found


@triton.jit
def _level_sets(
    row: tl.tensor, size: tl.tensor, best: tl.tensor, divisor: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Tokens within 16, 8 and 4 of the best, [4] with the last unused, their weights, and the weight of all."""
    total = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((4,), tl.int32)
    masses = tl.zeros((4,), tl.float64)
    slots = tl.arange(0, 4)
    for base in range(0, size, BLOCK):
        exists, bits, weight = _near(row, base, size, best, divisor, BLOCK)
        distance = bits.to(tl.float32, bitcast=True)
        total += tl.where(exists, weight, 0.0)
        for i in tl.static_range(3):
            within = exists & (distance <= (16 >> i))
            counts += tl.where(slots == i, tl.sum(within.to(tl.int32), 0), 0)
            masses += tl.where(slots == i, tl.sum(tl.where(within, weight, 0.0), 0), 0.0)
    return counts, masses, tl.sum(total, 0)


@triton.jit
def _gather(
    row: tl.tensor,
    near_values: tl.tensor,
    near_ids: tl.tensor,
    size: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    level: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the logits within `level` of the best, and their ids, one behind the other in the order of ids."""
    begin = 0
    for base in range(0, size, BLOCK):
        exists, bits, _ = _near(row, base, size, best, divisor, BLOCK)
        within = exists & (bits.to(tl.float32, bitcast=True) <= level)
        place = begin + tl.cumsum(within.to(tl.int32), 0) - 1
        at = base + tl.arange(0, BLOCK)
        tl.store(near_values + place, tl.load(row + at, mask=within, other=0.0), mask=within)
        tl.store(near_ids + place, at, mask=within)
        begin += tl.sum(within.to(tl.int32), 0)


@triton.jit
def _scan(
    values: tl.tensor,
    size: tl.tensor,
    best: tl.tensor,
    divisor: tl.tensor,
    farthest: tl.tensor,
    quota: tl.tensor,
    min_p: tl.tensor,
    target: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weight of the kept tokens, the first at which it exceeds `target` (`size` = none), and the last of any weight."""
    mass = tl.zeros((1,), tl.float64)
    ties = tl.zeros((1,), tl.int32)
    found = size + tl.zeros((1,), tl.int32)
    last = tl.zeros((1,), tl.int32)
    for base in range(0, size, BLOCK):
        exists, bits, weight = _near(values, base, size, best, divisor, BLOCK)
        at = base + tl.arange(0, BLOCK)
        tied = exists & (bits == farthest)
        rank = ties + tl.cumsum(tied.to(tl.int32), 0)
        kept = (exists & (bits < farthest)) | (tied & (rank <= quota))
        kept = kept & (weight >= min_p) & (weight > 0.0)
        weight = tl.where(kept, weight, 0.0)
        reached = mass + tl.cumsum(weight, 0)
        found = tl.minimum(found, tl.min(tl.where(kept & (reached > target), at, size), 0))
        last = tl.maximum(last, tl.max(tl.where(kept, at, 0), 0))
        mass += tl.sum(weight, 0)
        ties += tl.sum(tied.to(tl.int32), 0)
    return tl.sum(mass, 0), tl.sum(found, 0), tl.sum(last, 0)


def draw(scores: Tensor, words: Tensor, *, adjusted: bool) -> Tensor:
    """Choose a token from each row of logits, as `pawl_workers.sampling` defines it.

    Args:
        scores: [S, V] float32, contiguous.
        words: [S, 6] int64 on the same device, as `sampling.words` makes them.
        adjusted: minus infinity marks tokens that must not be chosen; else it is an error like other such values.

    Returns:
        [S] int32: a token id; -1 where a logit is not finite, -2 where no token is left.
    """
    num_samples, size = scores.shape
    chosen = torch.empty(num_samples, dtype=torch.int32, device=scores.device)
    if num_samples:
        block = min(_BLOCK, triton.next_power_of_2(size))
        near_values = torch.empty(num_samples, block, dtype=torch.float32, device=scores.device)
        near_ids = torch.empty(num_samples, block, dtype=torch.int32, device=scores.device)
        _draw[(num_samples,)](
            scores, words, chosen, near_values, near_ids, size, ADJUSTED=adjusted, BLOCK=block,
            NOT_FINITE=NOT_FINITE, NOTHING_LEFT=NOTHING_LEFT, num_warps=16,
        )  # fmt: skip
    return chosen
