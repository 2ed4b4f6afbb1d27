"""Attention of the compiled kernels over every type of cache: fp64's results, and one token's bits in any company."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl_workers.batch import AttentionShape
from pawl_workers.kernels.cpu_layout import lay_out
from pawl_workers.kernels.native import build
from pawl_workers.model.weights import AttentionRule
from tests.fakes.attention_cases import arrays_of
from tests.fakes.cached_attention import CACHE_TYPES, CachedAttention, CachedCase


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@st.composite
def cases(draw: st.DrawFn) -> CachedCase:
    """Groups that fill tiles and such that do not, and sequences of one tile and of many, beyond a split."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 5, 13, 26]))
    head_dim = draw(st.sampled_from([4, 16, 24, 64, 80]))
    seed = draw(st.integers(0, 99))
    sinks = torch.randn(kv_heads * group, generator=torch.Generator().manual_seed(seed))
    rule = AttentionRule(
        scale=draw(st.sampled_from([head_dim**-0.5, 0.3])),
        window=draw(st.sampled_from([None, None, 1, 20, 100, 520])),
        softcap=draw(st.sampled_from([None, None, 4.0])),
        sinks=draw(st.sampled_from([None, sinks])),
    )
    lengths = draw(st.lists(st.sampled_from([1, 30, 33, 190, 300, 513, 600]), min_size=1, max_size=3))
    shape = AttentionShape(kv_heads * group, kv_heads, head_dim)
    return CachedCase(shape, rule, draw(st.sampled_from(CACHE_TYPES)), tuple(lengths), seed)


@given(case=cases(), data=st.data())
@settings(max_examples=60)
def test_a_token_has_its_bits_in_any_chunk_and_company(case: CachedCase, data: st.DataObject) -> None:
    """Whole prompts together are what fp64 finds; chunks, single tokens and more threads give the same bits."""
    attention = CachedAttention(case)
    together = attention.attend([(i, 0, length) for i, length in enumerate(case.lengths)])
    for i, found in enumerate(together):
        assert (found - attention.exact(i)).abs().max() < 4e-5
    for _ in range(4):
        parts = []
        for i, length in enumerate(case.lengths):
            start = data.draw(st.integers(0, length - 1))
            size = data.draw(st.sampled_from([1, 2, 5, 30, 64, 65, 300]))
            parts.append((i, start, min(length, start + size)))
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 5])))  # 5: at times more than there are items
        for (i, start, end), found in zip(parts, attention.attend(parts), strict=True):
            assert torch.equal(found, together[i][start:end]), (i, start, end)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_older_processors_attend_alike(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right with every level of instructions; AVX2 and AVX-512 to the bit."""
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", "avx2")
    has_avx2 = build.instruction_flags() != ()
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", level)
    digest = _digest_at(level)
    if level == "avx512" and has_avx2:
        assert digest == _digest_at("avx2")


def _digest_at(level: str) -> str:
    paths = os.pathsep.join(path for path in sys.path if path)
    variables = os.environ | {"PAWL_CPU_INSTRUCTIONS": level, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    program = "from tests.fakes.cached_attention import check_all; print(check_all())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=20), before=st.integers(0, 2000),
    kv_heads=st.integers(1, 8), group=st.integers(1, 60), num_threads=st.integers(1, 64),
)  # fmt: skip
def test_tiles_cover_every_row_once(
    lengths: list[int], before: int, kv_heads: int, group: int, num_threads: int
) -> None:
    """And hold no more rows than C has room for, or than there are partials for where splits are shared out."""
    shape = AttentionShape(kv_heads * group, kv_heads, 16)
    tables = np.zeros((len(lengths), -(-(before + max(lengths)) // 32)), dtype=np.int64)
    parts = [(i, before, before + length) for i, length in enumerate(lengths)]
    layout = lay_out(arrays_of(parts, tables), shape, num_threads)
    seen = torch.zeros(sum(lengths), group, dtype=torch.int64)
    most = 192 if layout.pairs is None else 24
    for sequence, first, position, tokens, head, heads, _ in layout.tiles.tolist():
        assert 0 < tokens * heads <= most
        assert position - before == first - sum(lengths[:sequence])
        assert position - before + tokens <= lengths[sequence]
        seen[first : first + tokens, head : head + heads] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("contexts", "rows"), [([200, 190, 210, 195], [0, 1, 3, 2]), ([900, 12, 11, 10], [0, 2, 3, 1])], ids=["fair", "not"]
)
def test_decodes_stay_with_the_end_that_places_them_where_that_is_fair(contexts: list[int], rows: list[int]) -> None:
    parts = [(i, context - 1, context) for i, context in enumerate(contexts)]
    layout = lay_out(arrays_of(parts, np.zeros((len(contexts), 30), dtype=np.int64)), AttentionShape(4, 4, 16), 2)
    assert layout.tiles[:, 1].tolist() == rows
