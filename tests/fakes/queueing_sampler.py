"""A CPU's sampler in the place of a GPU's: its ids come to the next step by `insert` alone, as if from a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.sampling.batch import IntArray, SamplingBatch

__all__ = ["QueueingCpuSampler"]


class QueueingCpuSampler(CpuSampler):
    """With it a worker with the cpu kernels keeps steps in flight, as one with the triton kernels does."""

    def queue(self, scores: Tensor, batch: SamplingBatch) -> Tensor:
        """Choose; there is nothing to queue behind."""
        return torch.from_numpy(self.choose(scores, batch)).to(torch.int32)

    def insert(self, token_ids: Tensor, chosen: Tensor) -> None:
        """One by one."""
        for place, token_id in enumerate(token_ids.tolist()):
            if token_id < 0:
                token_ids[place] = max(0, int(chosen[-1 - token_id]))

    def queue_description(
        self, scores: Tensor, samples: IntArray, chosen: Tensor, most: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Describe."""
        ids = np.maximum(chosen.numpy()[samples], 0).astype(np.int64)
        found = self.describe(scores, samples, ids, np.full(len(samples), most))
        columns = (found.logprobs, found.ranks, found.alternative_ids, found.alternative_logprobs)
        logprobs, ranks, best, best_logprobs = map(torch.from_numpy, columns)
        return logprobs, ranks, best, best_logprobs
