"""Builds the batch of a step from the row table: whole arrays, no loop over tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pawl_workers.batch import AttentionShape, Batch, IntArray, PromptRows, SamplingBatch, SequenceArrays
from pawl_workers.errors import PlanError
from pawl_workers.kernels import Kernels
from pawl_workers.model.rotary import RotaryTable, rotary_angles
from pawl_workers.row_masks import RowMasks
from pawl_workers.rows import RowTable
from pawl_workers.sampling.batch import TokenMasks
from pawl_workers.sampling.words import WORDS, parameter_words
from pawl_workers.staging import Staging

__all__ = ["BatchSettings", "batch_angles", "build_batch", "pad_decodes", "staged_elements", "with_masks"]


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What stays the same from step to step. `staging` carries a step's integers to a GPU in one copy."""

    kernels: Kernels
    shape: AttentionShape
    rotaries: tuple[RotaryTable, ...]
    device: torch.device
    dtype: torch.dtype
    staging: Staging | None = None

    def put(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        """Bring integers to the device; staged ones are there once the step's copy is sent."""
        if self.staging is None:
            return torch.from_numpy(array).to(self.device)
        return self.staging.put(array)


def build_batch(
    table: RowTable,
    rows: IntArray,
    num_tokens: IntArray,
    settings: BatchSettings,
    padded: int | None = None,
    num_drafts: IntArray | None = None,
) -> tuple[Batch, IntArray]:
    """Build the batch in which `rows[i]` computes its next `num_tokens[i]` tokens.

    Args:
        table: what the rows hold.
        rows: rows that compute.
        num_tokens: how many tokens of each.
        settings: of the worker.
        padded: rows of the batch, where all compute and sample one token and the batch is for a captured graph: then
            it has no angles, the graph computes its own, and tables are as wide as they ever get.
        num_drafts: how many of its tokens are drafts, of each of `rows`; None = nothing is drafted.

    Returns:
        The batch, and the rows that sample: those whose last known token is in the step, once for it and once for
        each of their drafts.
    """
    sequence, positions = table.positions(rows, num_tokens)
    token_ids = table.token_ids[rows[sequence], positions].astype(np.int64)
    starts = np.cumsum(num_tokens) - num_tokens
    contexts = table.num_computed[rows] + num_tokens
    furthest = int(contexts.max()) - 1
    most_blocks = furthest // settings.kernels.block_size + 1
    arrays = SequenceArrays(
        starts=starts,
        lengths=num_tokens,
        contexts=contexts,
        positions=positions,
        sequence_of_token=sequence,
        block_tables=table.block_tables[rows] if padded else table.block_tables[rows, :most_blocks],
    )
    if num_drafts is None:
        sampling = (contexts == table.num_tokens[rows]) & table.samples[rows]
        last, sampling_rows = (starts + num_tokens - 1)[sampling], rows[sampling]
    else:
        sampling = (contexts == table.num_tokens[rows] + num_drafts) & table.samples[rows]
        counts = np.where(sampling, 1 + num_drafts, 0)
        sampling_rows = np.repeat(rows, counts)
        last = np.repeat(starts + num_tokens - np.cumsum(counts), counts) + np.arange(len(sampling_rows))
    if padded is not None:
        arrays = pad_decodes(arrays, padded)
        token_ids, last = np.append(token_ids, np.zeros(padded - len(rows), dtype=np.int64)), arrays.starts
    staging, put = settings.staging, settings.put
    if staging is not None:
        num_samples = max(len(arrays.starts), len(sampling_rows))
        staging.begin(staged_elements(len(token_ids), len(arrays.starts), arrays.block_tables.shape[1], num_samples))
    # What a graph reads is put first, in an order and in sizes that its number of rows fixes.
    device_token_ids, device_positions, device_last = put(token_ids), put(arrays.positions), put(last)
    layout = settings.kernels.lay_out(arrays, settings.shape)
    most_drafts = 0 if num_drafts is None else int(num_drafts.max(initial=0))
    samples = _sampling(table, sampling_rows, settings, most_drafts)
    if staging is not None:
        staging.send()
    batch = Batch(
        token_ids=device_token_ids,
        positions=device_positions,
        rotary=() if padded else batch_angles(device_positions, settings, furthest),
        attention=layout,
        last=device_last,
        sampling=samples,
        prompts=_prompts(table, rows, num_tokens, starts),
    )
    return batch, sampling_rows


def with_masks(batch: Batch, masks: RowMasks) -> Batch:
    """Let rows choose only what their masks allow. A mask of a row that does not sample is passed over.

    Raises:
        PlanError: a row has fewer masks than samples.
    """
    rows = batch.sampling.rows
    places: dict[int, list[int]] = {}
    for place, row in enumerate(masks.rows):
        places.setdefault(row, []).append(place)
    of_sample, given = np.full(len(rows), -1, dtype=np.int64), Counter[int]()
    for i, row in enumerate(rows.tolist()):
        if row in places:
            if given[row] == len(places[row]):
                raise PlanError(f"row {row} has {given[row]} masks and more samples: one for each is needed")
            of_sample[i] = places[row][given[row]]
            given[row] += 1
    if not given:
        return batch
    return replace(batch, sampling=replace(batch.sampling, masks=TokenMasks(masks.words, of_sample)))


def batch_angles(
    positions: Tensor, settings: BatchSettings, furthest: int | None = None
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Cosines and signed sines of some positions, [T], for each rotary embedding of the model; see `rotary_angles`."""
    return tuple(rotary_angles(table, positions, settings.dtype, furthest) for table in settings.rotaries)


def pad_decodes(arrays: SequenceArrays, num_rows: int) -> SequenceArrays:
    """Add rows of padding to sequences that compute one token each: a context of 0, and tables of null blocks."""
    missing = num_rows - len(arrays.starts)
    none = np.zeros(missing, dtype=np.int64)
    rows = np.arange(num_rows)
    return SequenceArrays(
        starts=rows,
        lengths=np.ones(num_rows, dtype=np.int64),
        contexts=np.append(arrays.contexts, none),
        positions=np.append(arrays.positions, none),
        sequence_of_token=rows,
        block_tables=np.pad(arrays.block_tables, ((0, missing), (0, 0))),
    )


def staged_elements(num_tokens: int, num_sequences: int, most_blocks: int, num_samples: int) -> int:
    """Most int32 elements that a step puts: tokens thrice, tiles, tables, what each sequence has, and the sampling."""
    per_token = Staging.elements(*[num_tokens] * 3, 4 * num_tokens, num_tokens)
    per_sequence = Staging.elements(*[num_sequences] * 5, 2 * WORDS * num_samples)
    return per_token + per_sequence + Staging.elements(num_sequences * most_blocks)


def _sampling(table: RowTable, rows: IntArray, settings: BatchSettings, most_drafts: int) -> SamplingBatch:
    """How these rows sample: each at the position after its last token, and then, if it is repeated, at the next."""
    positions = table.num_tokens[rows]
    drafts = np.zeros((len(rows), 0), dtype=np.int64)
    if most_drafts:
        begins = np.concatenate([[True], rows[1:] != rows[:-1]])
        places = np.arange(len(rows))
        num_before = places - np.maximum.accumulate(np.where(begins, places, 0))
        columns = np.arange(most_drafts)
        drafted = table.token_ids[rows[:, None], np.minimum(positions[:, None] + columns, table.token_ids.shape[1] - 1)]
        drafts = np.where(columns < num_before[:, None], drafted, -1).astype(np.int64)
        positions = positions + num_before
    words = None
    if settings.staging is not None:
        words = settings.staging.put(parameter_words(table.sampling, rows, positions).view(np.int32))
    adjusts = bool(table.sampling.adjusted[rows].any())
    describes = bool((table.sampling.alternatives[rows] >= 0).any())
    return SamplingBatch(
        sampler=settings.kernels.sampler,
        table=table.sampling,
        rows=rows,
        positions=positions,
        num_output=positions - table.num_prompt[rows],
        drafts=drafts,
        words=words,
        adjusts=adjusts,
        describes=describes,
        greedy=not adjusts and not describes and not table.sampling.temperature[rows].any(),
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
