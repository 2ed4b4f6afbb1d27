"""Sampling on a GPU: one kernel chooses the tokens of all samples, and their ids are all that comes back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pawl_workers.kernels.torch_sampler import TorchSampler, adjust, describe_tokens
from pawl_workers.kernels.triton.draw import draw
from pawl_workers.kernels.triton.insert import insert
from pawl_workers.sampling.adjustments import Adjustments, gather_adjustments
from pawl_workers.sampling.batch import NOT_FINITE, IntArray, SamplingBatch
from pawl_workers.sampling.logprobs import TokenScores
from pawl_workers.sampling.words import WORDS, parameter_words
from pawl_workers.staging import send

__all__ = ["TritonSampler"]


class TritonSampler:
    """Draws without a sort. Lists of penalties, biases and masks are copied for the samples that have any."""

    def __init__(self) -> None:
        self._describer = TorchSampler()
        self._arrived = torch.empty(0, dtype=torch.int32)

    def choose(self, scores: Tensor, batch: SamplingBatch) -> IntArray:
        """Choose a token from each row of logits; see `Sampler`."""
        return self._bring_back(self.queue(scores, batch))

    def queue(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        """Choose, and leave the ids on the device; see `QueueingSampler`."""
        words = batch.words
        if words is None:
            columns = parameter_words(batch.table, batch.rows, batch.positions).view(np.int32)
            words = send(columns, scores.device)
        words = words.view(torch.int64).view(-1, WORDS)
        chosen = draw(scores, words, adjusted=False)
        adjustments = gather_adjustments(batch)
        if adjustments is not None:
            self._choose_adjusted(scores, words, batch, adjustments, chosen)
        return chosen

    def insert(self, token_ids: Tensor, chosen: Tensor) -> None:
        """Put chosen ids where a step's token ids refer to them; see `QueueingSampler`."""
        insert(token_ids, chosen)

    def _choose_adjusted(
        self, scores: Tensor, words: Tensor, batch: SamplingBatch, adjustments: Adjustments, chosen: Tensor
    ) -> None:
        adjusted = (np.diff(adjustments.seen.starts) > 0) | (np.diff(adjustments.bias.starts) > 0)
        if adjustments.masks is not None:
            adjusted |= adjustments.masks.of_sample >= 0
        samples = np.flatnonzero(adjusted)
        if not len(samples):
            return
        index = send(samples, scores.device)
        logits = scores[index]
        adjust(logits, samples, adjustments, batch.table.repetition[batch.rows[samples]])
        found = draw(logits, words[index], adjusted=True)
        chosen[index] = torch.where(chosen[index] == NOT_FINITE, NOT_FINITE, found)

    def _bring_back(self, chosen: Tensor) -> IntArray:
        if chosen.is_cuda:
            # Into pinned memory, and waited for by an event: the one point where the host waits for the step.
            if self._arrived.numel() < chosen.numel():
                self._arrived = torch.empty(chosen.numel(), dtype=torch.int32, pin_memory=True)
            arrived = self._arrived[: chosen.numel()]
            arrived.copy_(chosen, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
            event.synchronize()
            chosen = arrived
        found: IntArray = chosen.numpy().astype(np.int64)
        return found

    def queue_description(
        self, scores: Tensor, samples: IntArray, chosen: Tensor, most: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Describe chosen tokens, and leave that on the device; see `QueueingSampler`."""
        index = send(samples, scores.device)
        return describe_tokens(scores[index], chosen[index].clamp(min=0).long(), most)

    def describe(self, scores: Tensor, rows: IntArray, token_ids: IntArray, num_alternatives: IntArray) -> TokenScores:
        """Describe tokens under the softmax of untouched logits; see `Sampler`."""
        return self._describer.describe(scores, rows, token_ids, num_alternatives)
