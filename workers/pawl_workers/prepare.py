"""Builds the batch of a step from the row table: whole arrays, no loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pawl_workers.batch import AttentionShape, Batch, IntArray, PromptRows, SamplingBatch, SequenceArrays
from pawl_workers.kernels import Kernels
from pawl_workers.model.rotary import RotaryTable, rotary_angles
from pawl_workers.rows import RowTable
from pawl_workers.sampling.batch import Sampler

__all__ = ["BatchSettings", "build_batch"]


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What stays the same from step to step."""

    kernels: Kernels
    shape: AttentionShape
    rotaries: tuple[RotaryTable, ...]
    device: torch.device
    dtype: torch.dtype


def build_batch(
    table: RowTable, rows: IntArray, num_tokens: IntArray, settings: BatchSettings
) -> tuple[Batch, IntArray]:
    """Build the batch in which `rows[i]` computes its next `num_tokens[i]` tokens.

    Returns:
        The batch, and the rows that sample: those whose last known token is in the step.
    """
    sequence, positions = table.positions(rows, num_tokens)
    token_ids = table.token_ids[rows[sequence], positions].astype(np.int64)
    starts = np.cumsum(num_tokens) - num_tokens
    contexts = table.num_computed[rows] + num_tokens
    most_blocks = -(-int(contexts.max()) // settings.kernels.block_size)
    arrays = SequenceArrays(
        starts=starts,
        lengths=num_tokens,
        contexts=contexts,
        positions=positions,
        sequence_of_token=sequence,
        block_tables=table.block_tables[rows, :most_blocks],
    )
    device = settings.device
    device_positions = torch.from_numpy(positions).to(device)
    sampling = (contexts == table.num_tokens[rows]) & table.samples[rows]
    sampling_rows = rows[sampling]
    batch = Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=device_positions,
        rotary=tuple(rotary_angles(table, device_positions, settings.dtype) for table in settings.rotaries),
        attention=settings.kernels.lay_out(arrays, settings.shape),
        last=torch.from_numpy((starts + num_tokens - 1)[sampling]).to(device),
        sampling=_sampling(table, sampling_rows, settings.kernels.sampler),
        prompts=_prompts(table, rows, num_tokens, starts),
    )
    return batch, sampling_rows


def _sampling(table: RowTable, rows: IntArray, sampler: Sampler) -> SamplingBatch:
    positions = table.num_tokens[rows]
    return SamplingBatch(
        sampler=sampler,
        table=table.sampling,
        rows=rows,
        positions=positions,
        num_output=positions - table.num_prompt[rows],
        drafts=np.zeros((len(rows), 0), dtype=np.int64),
    )


def _prompts(table: RowTable, rows: IntArray, num_tokens: IntArray, starts: IntArray) -> list[PromptRows]:
    prompts = []
    for i in np.flatnonzero(table.prompt_alternatives[rows] >= 0).tolist():
        row, computed = int(rows[i]), int(table.num_computed[rows[i]])
        # The token at position p is scored by the row of position p - 1.
        first_position = max(computed + 1, int(table.prompt_from[row]), 1)
        end = min(computed + int(num_tokens[i]) + 1, int(table.num_prompt[row]))
        if first_position < end:
            prompts.append(
                PromptRows(
                    row=row,
                    first=int(starts[i]) + first_position - 1 - computed,
                    first_position=first_position,
                    target_ids=table.token_ids[row, first_position:end].astype(np.int64),
                    num_alternatives=int(table.prompt_alternatives[row]),
                )
            )
    return prompts
