"""The compiled kernels against fp64, in every format, and how they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pawl_workers.batch import AttentionShape, SequenceArrays
from pawl_workers.errors import WorkerError
from pawl_workers.kernels import Kernels, choose_backend
from pawl_workers.kernels.cpu import CpuKernels
from pawl_workers.kernels.cpu_linear import CODED_FORMAT, CpuLinear
from pawl_workers.kernels.native import build
from pawl_workers.kernels.native.library import load_library
from pawl_workers.kernels.reference import ReferenceActivation, ReferenceKernels
from pawl_workers.model.packed import NormWeights
from pawl_workers.model.spec import Activation, NormKind, QueryKeyNorm
from pawl_workers.model.weights import AttentionRule, QueryKeyNormWeights
from tests.fakes.threads import compute_threads

FORMATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = AttentionShape(4, 2, 16)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    return CpuKernels()


def _weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7 + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype).float()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(96, 48), (1, 3), (17, 100), (257, 48), (1536, 576)])
def test_linears_are_exact_in_any_format_and_read_back(
    kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, x = _weight(*shape, dtype), _weight(130, shape[1], torch.float32)
    bias = _weight(1, shape[0], torch.float32)[0]
    if dtype is torch.float32:
        weight.view(-1)[:3] = torch.tensor([-0.0, 1e-42, 3e4])
    packed = kernels.pack_linear(weight, bias)
    assert torch.equal(packed.unpack().view(torch.int32), weight.view(torch.int32))
    width = 2 * load_library().panel_width
    inner = shape[1] + (shape[1] % 2 if dtype is torch.bfloat16 else 0)
    num_bytes = -(-shape[0] // width) * width * inner * dtype.itemsize
    coded = packed.call().format == CODED_FORMAT
    assert packed.num_bytes < 0.76 * num_bytes if coded else packed.num_bytes == num_bytes
    wanted = x.double() @ weight.double().T + bias.double()
    bound = 1e-6 * shape[1] * float(weight.abs().max() * x.abs().max()) + 1e-5
    assert (packed(x) - wanted).abs().max() <= bound
    assert packed(x[:0]).shape == (0, shape[0])
    spread = torch.cat([x, x], dim=1)[:, : shape[1]]  # rows that do not touch
    assert torch.equal(packed(spread), packed(x))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_a_row_has_the_same_bits_in_any_company(kernels: CpuKernels, dtype: torch.dtype, num_threads: int) -> None:
    linear, x = kernels.pack_linear(_weight(520, 96, dtype), None), _weight(230, 96, torch.float32)
    whole = linear(x)
    with compute_threads(num_threads):
        for num_rows in [*range(1, 40), 95, 96, 97, 108, 200]:
            assert torch.equal(linear(x[:num_rows]), whole[:num_rows]), num_rows
            assert torch.equal(linear(x[-num_rows:]), whole[-num_rows:]), num_rows


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_blocks_of_rows_that_threads_have_to_themselves(
    kernels: CpuKernels, num_threads: int
) -> None:
    linear, x = kernels.pack_linear(_weight(200, 1544, torch.bfloat16), None), _weight(700, 1544, torch.float32)
    few = torch.cat([linear(x[row : row + 7]) for row in range(0, len(x), 7)])
    with compute_threads(num_threads):
        for num_rows in (193, 287, 389, 700):
            assert torch.equal(linear(x[:num_rows]), few[:num_rows]), num_rows


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_weight_is_packed_from_the_type_it_is_stored_in(kernels: CpuKernels, stored: torch.dtype) -> None:
    """Every 16-bit value, the smallest and those that are no numbers included, comes back as it was widened."""
    assert kernels.linear_dtype(stored, torch.float32) is stored
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(stored).view(256, 256)
    packed = kernels.pack_linear(weight, None)
    assert packed.num_bytes == kernels.packed_bytes((256, 256), stored, torch.float32)
    assert torch.equal(packed.unpack().view(torch.int32), weight.float().view(torch.int32))


@dataclass(frozen=True)
class _Step:
    """Heads, what turns and is normalised, the rule, and sequences as (tokens before, tokens in this step)."""

    shape: AttentionShape
    rotary_dim: int
    norms: QueryKeyNormWeights | None
    rule: AttentionRule
    sequences: list[tuple[int, int]]
    seed: int


@st.composite
def _steps(draw: st.DrawFn) -> _Step:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 24, 30]))
    head_dim = draw(st.sampled_from([2, 8, 12, 40, 64]))
    shape = AttentionShape(kv_heads * group, kv_heads, head_dim)
    before = st.sampled_from([0, 1, 31, 32, 63, 300, 511, 512, 530])
    kind, norms = draw(st.sampled_from([None, *QueryKeyNorm])), None
    if kind is not None:
        per_head = kind is QueryKeyNorm.HEAD
        query, key = (
            _weight(1, head_dim * (1 if per_head else heads), torch.float32)[0] for heads in (shape.num_heads, kv_heads)
        )
        norms = QueryKeyNormWeights(kind, query, key, 1e-5)
    rule = AttentionRule(
        scale=draw(st.sampled_from([head_dim**-0.5, 0.3])),
        window=draw(st.sampled_from([None, 1, 5, 33, 100, 520])),
        softcap=draw(st.sampled_from([None, 0.5, 20.0])),
        sinks=draw(st.sampled_from([None, _weight(1, shape.num_heads, torch.float32)[0]])),
    )
    sequences = draw(st.lists(st.tuples(before, st.integers(1, 40)), min_size=1, max_size=4))
    rotary_dim = draw(st.sampled_from([0, 2, head_dim // 4 * 2 or 2, head_dim]))
    return _Step(shape, rotary_dim, norms, rule, sequences, draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", ["cpu", "onednn"])
@given(step=_steps())
@settings(max_examples=80)
def test_attention_equals_the_reference(name: str, step: _Step) -> None:
    """Keys and values written in two steps through shuffled blocks, then attended to."""
    device = torch.device("cpu")
    backend = choose_backend(device, torch.float32, step.shape, name)
    assert (_attend(backend, step) - _attend(ReferenceKernels(device), step)).abs().max() < 4e-5


def _attend(backend: Kernels, step: _Step) -> Tensor:
    shape, sequences, seed = step.shape, step.sequences, step.seed
    rng, size = np.random.default_rng(seed), backend.block_size
    most = max(-(-(before + new) // size) for before, new in sequences)
    num_blocks = most * len(sequences) + 1
    tables = rng.permutation(np.arange(1, num_blocks)).reshape(len(sequences), most)
    keys, values = (torch.zeros(cache) for cache in backend.cache_shapes(num_blocks, shape))
    width = shape.num_heads + 2 * shape.num_kv_heads

    def run(parts: list[tuple[int, int, int]]) -> Tensor:
        """Sequence, first and last position: written and attended to in one step."""
        members, starts, ends = (np.array(column) for column in zip(*parts, strict=True))
        lengths = ends - starts
        positions = np.concatenate([np.arange(start, end) for _, start, end in parts])
        layout = backend.lay_out(
            SequenceArrays(
                starts=np.cumsum(lengths) - lengths,
                lengths=lengths,
                contexts=ends,
                positions=positions,
                sequence_of_token=np.repeat(np.arange(len(parts)), lengths),
                block_tables=tables[members],
            ),
            shape,
        )
        # What a token holds is a function of its sequence and position, so that both backends see the same.
        heads = [
            torch.from_numpy(np.random.default_rng((seed, sequence, position)).standard_normal((width, shape.head_dim)))
            for sequence, start, end in parts
            for position in range(start, end)
        ]
        angles = torch.from_numpy(positions).float()[:, None, None] * torch.linspace(1, 0.01, step.rotary_dim // 2)
        rotary = (torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1))
        q = backend.place(
            torch.stack(heads).float(), rotary if step.rotary_dim else None, step.norms, keys, values, layout
        )
        return backend.attend(q, step.rule, keys, values, layout)

    if earlier := [(i, 0, before) for i, (before, _) in enumerate(sequences) if before]:
        run(earlier)
    return run([(i, before, before + new) for i, (before, new) in enumerate(sequences)])


def test_norm_and_gate_equal_the_reference(kernels: CpuKernels) -> None:
    for width in (3, 16, 100, 576):
        x = _weight(37, width, torch.float32) * 5
        w = NormWeights(NormKind.RMS, _weight(1, width, torch.float32)[0], None, 1e-5)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.weight.double()
        assert (kernels.pack_norm(w)(x) - exact).abs().max() < 1e-5
        hidden = torch.cat([x * 20, x], dim=-1)  # gates far into both tails
        wanted = ReferenceActivation(Activation.SILU, gated=True)(hidden.clone())
        gated = kernels.pack_activation(Activation.SILU, gated=True)(hidden)
        assert torch.allclose(gated, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_the_server_says_so_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pawl_workers.kernels.native import library

    def no_compiler() -> Path:
        raise build.BuildError("there is no C compiler (cc or gcc)")

    monkeypatch.setattr(library, "find_or_build", no_compiler)
    library.load_library.cache_clear()
    try:
        chosen = choose_backend(torch.device("cpu"), torch.float32, SHAPE)
        assert chosen.name == "onednn"
        assert len(caplog.messages) == 1
        assert "no C compiler" in caplog.text
        with pytest.raises(WorkerError, match="no C compiler"):
            choose_backend(torch.device("cpu"), torch.float32, SHAPE, "cpu")
    finally:
        library.load_library.cache_clear()


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 1 || { echo 'cannot compile' >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="cannot compile"):
        build.find_or_build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def _computed_at(level: str) -> str:
    """What a process prints that uses at most these instructions: checks, and a digest of its results."""
    program = (
        "import hashlib, torch\n"
        "from pawl_workers.kernels.cpu import CpuKernels\n"
        "k, g, digest = CpuKernels(), torch.Generator().manual_seed(0), hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    w, x = torch.randn(50, 40, generator=g).to(dtype).float(), torch.randn(70, 40, generator=g)\n"
        "    y = k.pack_linear(w, None)(x)\n"
        "    print((y - (x.double() @ w.double().T)).abs().max().item() < 1e-4)\n"
        "    print(all(torch.equal(k.pack_linear(w, None)(x[:n]), y[:n]) for n in (1, 5, 12, 16, 33)))\n"
        "    in_fp32 = k.pack_linear(torch.cat([w, torch.full((1, 40), 0.1)]), None)\n"
        "    print(torch.equal(in_fp32(x)[:, :50], y))\n"
        "    digest.update(y.numpy().tobytes())\n"
        "import numpy as np\n"
        "from pawl_workers.kernels.torch_sampler import TorchSampler\n"
        "from pawl_workers.plan import SamplingSpec\n"
        "from pawl_workers.sampling.table import SamplingTable\n"
        "from tests.fakes.sampling_oracle import make_batch\n"
        "scores, table, rows = torch.randn(60, 300, generator=g), SamplingTable(60), range(60)\n"
        "for row in rows:\n"
        "    table.add(row, SamplingSpec(seed=row, top_k=[0, 40][row % 2], top_p=[1, 0.9, 0.5][row % 3]), [], [])\n"
        "samplers = k.sampler, TorchSampler()\n"
        "found, wanted = (s.choose(scores, make_batch(s, table, rows, rows)) for s in samplers)\n"
        "print(bool((found == wanted).all()))\n"
        "all_rows, zeros, fours = np.arange(60), np.zeros(60, dtype=np.int64), np.full(60, 4)\n"
        "found, wanted = (s.describe(scores, all_rows, zeros, fours) for s in samplers)\n"
        "print(bool(np.abs(found.alternative_logprobs - wanted.alternative_logprobs).max() < 1e-5))\n"
        "print(digest.hexdigest())\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    variables = os.environ | {"PAWL_CPU_INSTRUCTIONS": level, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    *checks, digest = done.stdout.split() or [done.stderr]
    assert checks == ["True"] * 11, done.stderr
    return digest


def test_older_processors_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding; AVX2 and AVX-512 to the bit, and there each format of weights too."""
    flags = {}
    for level in ("portable", "avx2", "avx512"):
        monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", level)
        flags[build.instruction_flags()] = level
    digests = {level: _computed_at(level) for level in flags.values()}
    assert len(set(digests.values()) - {digests["portable"]}) <= 1


def test_instructions_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", "mmx")
    with pytest.raises(build.BuildError, match="PAWL_CPU_INSTRUCTIONS is 'mmx'; known: amx, avx512, avx2, portable"):
        build.instruction_flags()


def test_linears_know_their_shape(kernels: CpuKernels) -> None:
    linear = kernels.pack_linear(_weight(5, 7, torch.float32), None)
    assert isinstance(linear, CpuLinear)
    assert (linear.out_features, linear.in_features, linear.bias) == (5, 7, None)
