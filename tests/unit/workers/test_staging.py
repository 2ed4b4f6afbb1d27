"""Staging, padding and the choice of a graph: all of a captured step but the capture, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pawl_workers.batch import AttentionShape, SequenceArrays
from pawl_workers.forward import compute
from pawl_workers.graphs import BUCKETS, DecodeGraphs, bucket_of
from pawl_workers.kernels import choose_backend
from pawl_workers.kernels.triton.backend import TritonKernels
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.loading import load_weights
from pawl_workers.model.rotary import rotary_table
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan
from pawl_workers.prepare import BatchSettings, batch_angles, build_batch, pad_decodes, staged_elements
from pawl_workers.rows import RowTable
from pawl_workers.sampling.table import SamplingTable
from pawl_workers.sampling.words import WORDS, parameter_words
from pawl_workers.staging import Staging

CPU = torch.device("cpu")


@given(shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), max_size=8))
def test_a_step_is_one_buffer_and_its_views_lie_where_they_lay(shapes: list[tuple[int, int]]) -> None:
    staging = Staging(CPU)
    needed = Staging.elements(*(rows * columns for rows, columns in shapes))
    offsets = []
    for step in range(2):
        arrays = [np.full(shape, 100 * step + i, dtype=np.int64) for i, shape in enumerate(shapes)]
        staging.begin(needed)
        views = [staging.put(array) for array in arrays]
        staging.send()
        for view, array in zip(views, arrays, strict=True):
            assert view.dtype is torch.int32
            assert view.tolist() == array.tolist()
            assert view.storage_offset() % 32 == 0
        assert len({view.untyped_storage().data_ptr() for view in views}) <= 1
        offsets.append([view.storage_offset() for view in views])
    assert offsets[0] == offsets[1]


def test_more_than_announced_is_refused_and_arrays_outside_a_step_go_alone() -> None:
    staging = Staging(CPU, 32)
    staging.begin(32)
    kept = staging.put(np.arange(30))
    with pytest.raises(ValueError, match="62 integers are put into a staging buffer of 32"):
        staging.put(np.arange(30))
    staging.send()
    alone = staging.put(np.arange(500))
    assert alone.tolist() == list(range(500))
    assert kept.tolist() == list(range(30))
    staging.begin(64)
    staging.put(np.zeros(64, dtype=np.int64))
    assert staging.capacity == 64
    assert kept.tolist() == list(range(30))  # a step's views outlive the next one on a CPU


def test_buckets() -> None:
    assert [bucket_of(n) for n in (1, 3, 9, 17, 100, 256, 257)] == [1, 4, 16, 24, 128, 256, None]
    assert all(bucket_of(bucket) == bucket for bucket in BUCKETS)
    ones = np.ones(5, dtype=np.int64)
    assert DecodeGraphs.rows_of(ones, 5) == 8
    assert DecodeGraphs.rows_of(ones, 4) is None  # a row in mid-prompt
    assert DecodeGraphs.rows_of(np.array([1, 2]), 2) is None


@given(
    sequences=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 60)), min_size=1, max_size=12),
    group=st.sampled_from([1, 7, 40]),
)
def test_a_step_never_puts_more_than_it_announces(sequences: list[tuple[int, int]], group: int) -> None:
    before, lengths = (np.array(column) for column in zip(*sequences, strict=True))
    shape, num_tokens = AttentionShape(group, 1, 16), int(lengths.sum())
    staging = Staging(CPU)
    kernels = TritonKernels(torch.float32, shape, staging)
    tables = np.zeros((len(sequences), 12), dtype=np.int64)
    positions = np.concatenate([np.arange(a, a + b) for a, b in sequences])
    owners = np.repeat(np.arange(len(sequences)), lengths)
    arrays = SequenceArrays(np.cumsum(lengths) - lengths, lengths, before + lengths, positions, owners, tables)
    staging.begin(staged_elements(num_tokens, len(sequences), 12, len(sequences)))
    for array in (positions, positions, np.zeros(len(sequences), dtype=np.int64)):
        staging.put(array)
    kernels.lay_out(arrays, shape)
    staging.put(np.zeros((len(sequences), 2 * WORDS), dtype=np.int32))


def test_parameters_are_words() -> None:
    table = SamplingTable(4)
    table.add(2, SamplingSpec(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=-3), [1], [])
    words = parameter_words(table, np.array([2, 0]), np.array([9, 1 << 40]))
    assert words[0, :3].view(np.float64).tolist() == [0.7, 0.9, 0.1]
    assert words[0, 3:].tolist() == [5, -3, 9]
    assert words[1].tolist() == [0, 0, 0, 0, 0, 1 << 40]


def test_padded_rows_change_nothing(llama_folder: Path) -> None:
    """A decode step padded to a bucket gives each real row the bits that it has without padding."""
    config = read_config(llama_folder)
    spec = config.spec
    shape, staging = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim), Staging(CPU)
    kernels = choose_backend(CPU, torch.float32, shape, "triton", staging=staging, strict=True)
    with torch.inference_mode():
        weights = load_weights(config, kernels, CPU, torch.float32, 1 << 40)
        cache = KvCache.allocate(spec, kernels, 16, CPU, torch.float32)
    rotaries = tuple(rotary_table(rotary, spec.max_context, CPU) for rotary in spec.rotaries)
    settings = BatchSettings(kernels, shape, rotaries, CPU, torch.float32, staging)
    table = RowTable(4, 256, kernels.block_size, 16, spec.vocab_size)
    blocks = {0: [5, 3], 1: [9], 2: [1]}
    new = [
        NewSequence(row, list(range(row, row + length)), length, 0, blocks[row], SamplingSpec(temperature=0.0))
        for row, length in ((0, 70), (1, 9), (2, 3))
    ]
    plan = StepPlan(1, 0, [], new, [], [], [])
    table.check(plan)
    table.apply(plan)
    rows = np.arange(3)
    with torch.inference_mode():
        batch, _ = build_batch(table, rows, np.array([69, 8, 2]), settings)
        compute(batch, weights, cache)
        table.num_computed[rows] += np.array([69, 8, 2])
        ones = np.ones(3, dtype=np.int64)
        batch, sampling_rows = build_batch(table, rows, ones, settings)
        wanted = compute(batch, weights, cache)
        padded, padded_sampling = build_batch(table, rows, ones, settings, 4)
        assert padded.rotary == ()
        angles = batch_angles(padded.positions, settings)
        stream, scores = compute(replace(padded, rotary=angles), weights, cache)
    assert sampling_rows.tolist() == padded_sampling.tolist() == [0, 1, 2]
    assert stream.shape[0] == scores.shape[0] == 4
    assert torch.equal(stream[:3], wanted[0])
    assert torch.allclose(scores[:3], wanted[1], atol=1e-5)  # the head is torch's own product here
    assert scores.isfinite().all()
    assert not _writes_elsewhere(cache)


def _writes_elsewhere(cache: KvCache) -> bool:
    """Whether a block that no row was given, other than the null block, was written."""
    unused = [block for block in range(1, 17) if block not in {5, 3, 9, 1}]
    return any(bool(cache[layer].keys[unused].any()) for layer in range(2))


def test_padding_has_no_context_and_null_blocks() -> None:
    arrays = SequenceArrays(
        starts=np.arange(2),
        lengths=np.ones(2, dtype=np.int64),
        contexts=np.array([7, 80]),
        positions=np.array([6, 79]),
        sequence_of_token=np.arange(2),
        block_tables=np.array([[4, 0], [2, 3]]),
    )
    padded = pad_decodes(arrays, 4)
    assert padded.contexts.tolist() == [7, 80, 0, 0]
    assert padded.positions.tolist() == [6, 79, 0, 0]
    assert padded.block_tables.tolist() == [[4, 0], [2, 3], [0, 0], [0, 0]]
    assert padded.starts.tolist() == padded.sequence_of_token.tolist() == [0, 1, 2, 3]
