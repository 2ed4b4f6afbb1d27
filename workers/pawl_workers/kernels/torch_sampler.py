"""Sampling in plain torch, on any device: the samples at once, in the few ways that a step's samples differ."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.sampling.adjustments import Adjustments, gather_adjustments
from pawl_workers.sampling.batch import NOT_FINITE, NOTHING_LEFT, IntArray, SamplingBatch, TokenMasks
from pawl_workers.sampling.logprobs import TokenScores
from pawl_workers.sampling.noise import uniform
from pawl_workers.sampling.table import SamplingTable
from pawl_workers.staging import send

__all__ = ["TorchSampler", "adjust", "describe_tokens"]

_AT_ONCE = 16
"""Samples whose weights, in float64, are held at a time."""

_FIRST_BEST = 128
"""Best tokens looked at first where a filter is set; eight times as many until they hold all that it can keep."""


class TorchSampler:
    """Greedy samples cost an argmax; filtered ones a partial selection of the best tokens."""

    def choose(self, scores: Tensor, batch: SamplingBatch) -> IntArray:
        """Choose a token from each row of logits; see `Sampler`."""
        chosen = scores.argmax(dim=-1)  # the lowest id among equals
        adjustments = gather_adjustments(batch)
        table, rows = batch.table, batch.rows
        adjusted = np.zeros(len(rows), dtype=np.bool_)
        if adjustments is not None:
            adjusted |= np.diff(adjustments.seen.starts) > 0
            adjusted |= np.diff(adjustments.bias.starts) > 0
            if adjustments.masks is not None:
                adjusted |= adjustments.masks.of_sample >= 0
        greedy = table.temperature[rows] == 0.0
        others = np.flatnonzero(adjusted | ~greedy)
        for begin in range(0, len(others), _AT_ONCE):
            part = others[begin : begin + _AT_ONCE]
            index = torch.from_numpy(part).to(scores.device)
            logits = scores[index]
            if adjustments is not None:
                adjust(logits, part, adjustments, table.repetition[rows[part]])
            best, tokens = logits.max(dim=-1, keepdim=True)
            tokens = tokens.squeeze(1)
            sampled = np.flatnonzero(~greedy[part])
            if len(sampled):
                places = torch.from_numpy(sampled).to(scores.device)
                at = rows[part[sampled]]
                noise = uniform(table.seed[at], batch.positions[part[sampled]])
                tokens[places] = _draw(logits[places], best[places], table, at, noise)
            chosen[index] = torch.where(best.squeeze(1).isfinite(), tokens, NOTHING_LEFT)
        # A sum is finite exactly when all logits are: they are far from the largest float.
        chosen = torch.where(scores.sum(dim=-1).isfinite(), chosen, NOT_FINITE)
        found: IntArray = chosen.cpu().numpy()
        return found

    def describe(self, scores: Tensor, rows: IntArray, token_ids: IntArray, num_alternatives: IntArray) -> TokenScores:
        """Describe tokens under the softmax of untouched logits; see `Sampler`."""
        chosen = send(token_ids, scores.device)
        found = describe_tokens(scores[send(rows, scores.device)], chosen, int(num_alternatives.max(initial=0)))
        return TokenScores(*(tensor.cpu().numpy() for tensor in found))


def describe_tokens(scores: Tensor, token_ids: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Describe a token of each row, without waiting for the device.

    Args:
        scores: logits, [N, V].
        token_ids: [N] int64.
        most: best tokens to list.

    Returns:
        What `TokenScores` holds, on the device of the logits.
    """
    index = token_ids.unsqueeze(1)
    logprobs = torch.log_softmax(scores, dim=-1)  # a row at a time: no row's bits depend on another
    ranks = (scores > scores.gather(1, index)).sum(dim=-1) + 1
    best = _best_ids(scores, min(most, scores.shape[1]))
    return logprobs.gather(1, index).squeeze(1), ranks, best, logprobs.gather(1, best)


def adjust(logits: Tensor, samples: IntArray, adjustments: Adjustments, repetition: NDArray[np.float32]) -> None:
    """Apply the adjustments of some samples to their logits, [N, V], in place."""
    device = logits.device
    for entries, is_bias in ((adjustments.seen, False), (adjustments.bias, True)):
        sizes = (entries.starts[1:] - entries.starts[:-1])[samples]
        if not sizes.any():
            continue
        at = np.repeat(np.arange(len(samples)), sizes)
        within = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = entries.starts[samples][at] + within
        index = send(at, device), send(entries.ids[places], device)
        values = send(entries.values[places], device)
        if is_bias:
            logits.index_put_(index, values, accumulate=True)
        else:
            seen, penalty = logits[index], send(repetition[at], device)
            logits[index] = torch.where(seen > 0, seen / penalty, seen * penalty) - values
    if adjustments.masks is not None:
        _mask(logits, samples, adjustments.masks)


def _mask(logits: Tensor, samples: IntArray, masks: TokenMasks) -> None:
    of_sample = masks.of_sample[samples]
    masked = np.flatnonzero(of_sample >= 0)
    if not len(masked):
        return
    allowed = np.zeros((len(masked), logits.shape[1]), dtype=np.bool_)
    octets = masks.words[of_sample[masked]].astype("<u4", copy=False).view(np.uint8)
    bits = np.unpackbits(octets, axis=1, count=min(octets.shape[1] * 8, logits.shape[1]), bitorder="little")
    allowed[:, : bits.shape[1]] = bits
    index = send(masked, logits.device)
    logits[index] = logits[index].masked_fill(~send(allowed, logits.device), -torch.inf)


def _draw(logits: Tensor, best: Tensor, table: SamplingTable, rows: IntArray, noise: NDArray[np.float64]) -> Tensor:
    """Filter and draw: logits [N, V], best [N, 1] -> token ids, [N]."""
    device, vocab_size = logits.device, logits.shape[1]
    temperature = torch.from_numpy(np.maximum(table.temperature[rows], 1e-30).astype(np.float32)).to(device)
    weights = ((logits - best) / temperature.unsqueeze(1)).double().exp_()
    top_k, top_p, min_p = table.top_k[rows], table.top_p[rows], table.min_p[rows]
    top_k = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    filtered = np.flatnonzero((top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0))
    if len(filtered):
        index = torch.from_numpy(filtered).to(device)
        limits = tuple(torch.from_numpy(array[filtered]).to(device) for array in (top_k, top_p, min_p))
        weights[index] = _filter(logits[index], weights[index], *limits)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    target = torch.from_numpy(noise).to(device).unsqueeze(1) * total
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Rounding: the last token that has any weight, which is where the sum first reaches its end.
    last = torch.searchsorted(cumulative, total).squeeze(1)
    return torch.minimum(drawn, last)


def _filter(logits: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Weights, [N, V] float64, with 0 for tokens that are not kept. top_k is at most V."""
    vocab_size = logits.shape[1]
    total = weights.cumsum(dim=-1)[:, -1]
    limits_k = top_k < vocab_size
    size = min(_FIRST_BEST, vocab_size)
    while True:
        keys, ids = logits.topk(size, dim=-1)
        shares = weights.gather(1, ids)
        cumulative = shares.cumsum(dim=-1)
        # Enough: k tokens, or the mass of top-p, or all that min-p keeps; else the whole vocabulary.
        by_mass = ~limits_k & (top_p < 1.0) & (cumulative[:, -1] >= top_p * total)
        enough = (top_k <= size) | by_mass | (~limits_k & (shares[:, -1] < min_p))
        if size == vocab_size or bool(enough.all()):
            break
        size = min(8 * size, vocab_size)
    places = torch.arange(size, device=logits.device)
    of_k = cumulative.gather(1, top_k.clamp(max=size).unsqueeze(1) - 1).squeeze(1)
    reach = torch.where(top_p < 1.0, top_p * torch.where(limits_k, of_k, total), torch.inf)
    before = cumulative - shares
    num_kept = ((places < top_k.unsqueeze(1)) & ((before < reach.unsqueeze(1)) | (places == 0))).sum(dim=-1)
    # Which of several equal tokens topk takes is left open: those of the lowest ids are kept.
    cut = keys.gather(1, num_kept.unsqueeze(1) - 1)
    ties = num_kept - (keys > cut).sum(dim=-1)
    tied = logits == cut
    kept = (logits > cut) | (tied & (tied.cumsum(dim=-1) <= ties.unsqueeze(1)))
    return weights.masked_fill(~kept | (weights < min_p.unsqueeze(1)), 0.0)


def _best_ids(scores: Tensor, most: int) -> Tensor:
    """The best tokens of each row, [N, most], by logit and then by id."""
    if most == 0:
        return torch.zeros(scores.shape[0], 0, dtype=torch.int64, device=scores.device)
    # topk leaves open which of several equal tokens it takes: those of the lowest ids are left for it.
    cut = scores.topk(most, dim=-1).values[:, -1:]
    above, tied = scores > cut, scores == cut
    kept = above | (tied & (tied.cumsum(dim=-1) <= most - above.sum(dim=-1, keepdim=True)))
    best = scores.masked_fill(~kept, -torch.inf).topk(most, dim=-1).indices.sort(dim=-1).values
    return best.gather(1, scores.gather(1, best).sort(dim=-1, descending=True, stable=True).indices)
