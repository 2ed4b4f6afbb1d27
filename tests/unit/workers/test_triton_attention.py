"""Attention, norms of heads, rotary turn and KV writes in Triton's interpreter, against the reference kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_workers.batch import AttentionShape, SequenceArrays
from pawl_workers.errors import WorkerError
from pawl_workers.kernels import choose_backend
from pawl_workers.kernels.reference import ReferenceKernels
from pawl_workers.kernels.triton.layout import SPLIT, lay_out_host
from pawl_workers.model.weights import AttentionRule
from tests.fakes.attention_cases import AttentionCase, attention_cases, run_case

CPU = torch.device("cpu")


@given(case=attention_cases())
@settings(max_examples=12)
def test_attention_equals_the_reference(case: AttentionCase) -> None:
    """Decodes and extends, over shuffled blocks that are partly written."""
    kernels = choose_backend(CPU, torch.float32, case.shape, "triton")
    for found, wanted in zip(run_case(kernels, case), run_case(ReferenceKernels(CPU), case), strict=True):
        assert (found - wanted).abs().max() < 4e-5


@given(case=attention_cases(head_dims=(16, 40), groups=(1, 3)))
@settings(max_examples=4)
def test_attention_in_half_precision(case: AttentionCase) -> None:
    kernels = choose_backend(CPU, torch.float16, case.shape, "triton")
    found = run_case(kernels, case, dtype=torch.float16)
    for rows, wanted in zip(found, run_case(ReferenceKernels(CPU), case), strict=True):
        assert (rows - wanted).abs().max() < 2e-2


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("window", [None, 70])
def test_strict_attention_has_the_same_bits_in_any_chunks(window: int | None) -> None:
    """Tokens around the end of a split: one by one, together, in odd chunks, and beside another sequence."""
    rule = AttentionRule(0.3, window, softcap=20.0)
    new = 4
    case = AttentionCase(AttentionShape(6, 2, 12), 8, None, rule, True, ((SPLIT - 2, new), (130, new)), 5)
    kernels = choose_backend(CPU, torch.float32, case.shape, "triton", strict=True)
    begins = [before for before, _ in case.sequences]

    def steps(*chunks: int) -> list[list[tuple[int, int, int]]]:
        ends = np.cumsum(chunks)
        return [
            [(i, begin + int(end) - chunk, begin + int(end)) for i, begin in enumerate(begins)]
            for end, chunk in zip(ends, chunks, strict=True)
        ]

    together = run_case(kernels, case, parts=steps(new))
    apart = [[(i, begin, begin + new)] for i, begin in enumerate(begins)]
    for parts in (steps(*[1] * new), steps(2, 1, 1), apart):
        for found, wanted in zip(run_case(kernels, case, parts=parts), together, strict=True):
            assert torch.equal(found, wanted)


@given(
    sequences=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=20),
    tokens_of_tile=st.sampled_from([1, 5, 16, 128]),
)
def test_a_layout_holds_every_token_once(sequences: list[tuple[int, int]], tokens_of_tile: int) -> None:
    before, lengths = (np.array(column) for column in zip(*sequences, strict=True))
    starts = np.cumsum(lengths) - lengths
    positions = np.concatenate([np.arange(a, a + b) for a, b in sequences])
    owners = np.repeat(np.arange(len(sequences)), lengths)
    tables = np.zeros((len(sequences), 60), dtype=np.int64)
    host = lay_out_host(SequenceArrays(starts, lengths, before + lengths, positions, owners, tables), tokens_of_tile)
    found = [
        (int(s), int(row), int(positions[row])) for s, row in zip(host.decode_sequences, host.decode_rows, strict=True)
    ]
    for sequence, row, position, count in host.tiles.tolist():
        assert 1 <= count <= tokens_of_tile
        found += [(sequence, row + i, position + i) for i in range(count)]
    assert sorted(found) == sorted(zip(owners.tolist(), range(len(positions)), positions.tolist(), strict=True))
    ends = host.tiles[:, 2] + host.tiles[:, 3]
    assert (np.diff(ends) <= 0).all()  # the longest work first
    longest = max((a + b for a, b in sequences if b == 1), default=1)
    assert host.num_splits.bit_count() == 1
    assert host.num_splits * SPLIT >= longest > (host.num_splits // 2) * SPLIT


def test_without_triton_a_gpu_is_served_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    shape = AttentionShape(2, 1, 8)
    for name in [name for name in sys.modules if name.startswith("pawl_workers.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_backend(torch.device("cuda"), torch.bfloat16, shape).name == "reference"
    assert len(caplog.messages) == 1
    assert "pip install triton" in caplog.text
    with pytest.raises(WorkerError, match="need the package triton"):
        choose_backend(torch.device("cuda"), torch.bfloat16, shape, "triton")


def test_a_cpu_is_refused_outside_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(WorkerError, match="compute on cuda, not on cpu; TRITON_INTERPRET=1"):
        choose_backend(CPU, torch.float32, AttentionShape(2, 1, 8), "triton")
