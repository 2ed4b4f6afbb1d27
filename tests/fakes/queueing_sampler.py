"""A CPU's sampler in the place of a GPU's: its ids come to the next step by `insert` alone, as if from a device."""

from __future__ import annotations

import torch
from torch import Tensor

from pawl_workers.kernels.cpu_sampler import CpuSampler
from pawl_workers.sampling.batch import SamplingBatch

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
