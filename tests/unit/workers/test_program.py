"""The compiled program of all layers: the bits of the stages, and what other types of KV and weights do to them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pawl_workers.errors import WorkerError
from pawl_workers.kernels import Precision
from pawl_workers.kernels.cpu_program import CpuProgram
from pawl_workers.kernels.cpu_seconds import KernelSeconds, LayerSeconds
from pawl_workers.memory import elements_per_token
from pawl_workers.options import WorkerOptions
from pawl_workers.worker import Worker
from tests.fakes.checkpoints import make_llama
from tests.fakes.families import FAMILIES, MAX_POSITIONS, Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.worker_driver import WorkerDriver

NOTHING = LayerSeconds(0.0, 0.0, 0.0, 0.0, 0.0)
CACHES = [None, torch.float16, torch.int8]


def tokens(seed: int, length: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(runner: LogitRunner, lengths: list[int], chunk: int) -> list[Tensor]:
    """All logits of some sequences that grow side by side, `chunk` tokens at a time."""
    prompts = [tokens(row, length, runner.spec.vocab_size) for row, length in enumerate(lengths)]
    for row, prompt in enumerate(prompts):
        runner.add(row, prompt)
    found: list[list[Tensor]] = [[] for _ in prompts]
    left = dict(enumerate(lengths))
    while any(left.values()):
        step = runner.step({row: min(chunk, count) for row, count in left.items() if count})
        for row, scores in step.items():
            found[row].append(scores)
            left[row] -= len(scores)
    for row in range(len(prompts)):
        runner.free(row)
    return [torch.cat(parts) for parts in found]


def draw_model(
    data: st.DataObject, family: str, folder: Path, caches: Sequence[torch.dtype | None], shortest: int
) -> tuple[Precision, list[int]]:
    """Write a checkpoint of a family; what it is served with, and the lengths of some prompts."""
    write_checkpoint(folder, data.draw(FAMILIES[family]))
    weights = data.draw(st.sampled_from([(None, None), (torch.int8, None), (torch.int8, 32)]))
    lengths = data.draw(st.lists(st.integers(shortest, 70), min_size=1, max_size=3))
    return Precision(data.draw(st.sampled_from(caches)), *weights), lengths


def both_ways(folder: Path, precision: Precision, lengths: list[int]) -> Iterator[LogitRunner]:
    """With the program, then stage by stage: sequences that sample and of which nothing is computed."""
    for one_by_one in (False, True):
        runner = LogitRunner(folder, "cpu", precision=precision, max_running=3, one_by_one=one_by_one)
        assert (runner.cache.scoring is None) == (runner.cache.program is None)
        assert not (one_by_one and runner.cache.program)
        for row, length in enumerate(lengths):
            runner.add(row, tokens(row, length, runner.spec.vocab_size), samples=True)
        yield runner


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(data=st.data())
@settings(max_examples=2)
def test_the_program_gives_the_bits_of_the_stages(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    """Every family, whole prompts and chunks, whatever the type of the cache."""
    folder = tmp_path_factory.mktemp("checkpoint")
    precision, lengths = draw_model(data, family, folder, CACHES, shortest=1)
    chunk = data.draw(st.sampled_from([1, 7, 70]))
    at_once = LogitRunner(folder, "cpu", precision=precision, max_running=3)
    staged = LogitRunner(folder, "cpu", precision=precision, max_running=3, one_by_one=True)
    assert staged.cache.program is None
    for ours, theirs in zip(logits_of(at_once, lengths, chunk), logits_of(staged, lengths, chunk), strict=True):
        assert torch.equal(ours, theirs)
    if isinstance(at_once.cache.program, CpuProgram):
        needed = at_once.spec.hidden_size + at_once.cache.program.floats_per_token
        assert elements_per_token(at_once.spec) >= needed, "more than a start sets aside for activations"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(data=st.data())
@settings(max_examples=2)
def test_the_program_gives_the_logits_of_the_stages(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    """Every family: decodes, which run through the head in one call, of one row and of several."""
    folder = tmp_path_factory.mktemp("checkpoint")
    precision, lengths = draw_model(data, family, folder, CACHES, shortest=2)
    found = []
    for runner in both_ways(folder, precision, lengths):
        runner.step({row: length - 1 for row, length in enumerate(lengths)})
        found.append(runner.decode(list(range(len(lengths)))))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(data=st.data())
@settings(max_examples=2)
def test_what_is_not_asked_about_leaves_out_the_last_layer(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    """Every family: steps in which all, some or none of the rows sample give the logits of the stages, and their KV."""
    folder = tmp_path_factory.mktemp("checkpoint")
    precision, lengths = draw_model(data, family, folder, CACHES, shortest=2)
    first = {row: data.draw(st.integers(1, length)) for row, length in enumerate(lengths)}
    rest = {row: length - first[row] for row, length in enumerate(lengths) if length > first[row]}
    found: list[list[Tensor]] = []
    for runner in both_ways(folder, precision, lengths):
        steps = [runner.sampled(grants) for grants in (first, rest) if grants]
        layers = [runner.cache[layer] for layer in range(runner.spec.num_layers)]
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        found.append([*steps, *cached])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(("overflowing", "fails"), [("self_attn.v_proj", True), ("mlp.up_proj", False)])
def test_a_row_that_is_not_asked_about_fails_by_what_it_leaves_alone(
    tmp_path: Path, overflowing: str, fails: bool
) -> None:
    """In the last layer: values that are not finite stay in the cache; an MLP that would not be is not computed."""
    folder = make_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.1.{overflowing}.weight"][3] = torch.finfo(torch.float32).max
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    driver = WorkerDriver(Worker.load(WorkerOptions(str(folder), kernels="cpu", max_running=1)))
    sequence = driver.start([1, 2, 3, 4, 5, 6])
    driver.step([(sequence, 4)])
    assert sequence.failure == ("the hidden state is not finite" if fails else None)
    if not fails:
        driver.step([(sequence, 2)])  # the last row samples
        assert sequence.failure == "the hidden state is not finite"


@given(
    num_experts=st.integers(1, 9), num_active=st.integers(1, 4), inner=st.sampled_from([16, 48]),
    hidden=st.integers(16, 50), normalised=st.booleans(), dense=st.lists(st.integers(0, 3), max_size=2),
    shared=st.sampled_from([None, 16, 80]), chunk=st.sampled_from([1, 7, 70]), num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_routed_layers_are_part_of_the_program(
    tmp_path_factory: pytest.TempPathFactory, num_experts: int, num_active: int, inner: int, hidden: int,
    normalised: bool, dense: list[int], shared: int | None, chunk: int, num_threads: int, seed: int,
) -> None:  # fmt: skip
    """Experts beside dense layers, few tokens and many, at experts that many, none or all share: the stages' bits."""
    folder = tmp_path_factory.mktemp("checkpoint")
    values: dict[str, object] = {
        "vocab_size": 97, "hidden_size": hidden, "intermediate_size": 32, "moe_intermediate_size": inner,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 3,
        "num_experts": num_experts, "num_experts_per_tok": min(num_active, num_experts), "norm_topk_prob": normalised,
        "decoder_sparse_step": 1, "mlp_only_layers": dense, "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    family = "Qwen3Moe" if shared is None else "Qwen2Moe"
    values |= {} if shared is None else {"shared_expert_intermediate_size": shared}
    write_checkpoint(folder, Draft(f"{family}ForCausalLM", f"{family}Config", values, torch.float32, seed))
    at_once = LogitRunner(folder, "cpu", max_running=3)
    staged = LogitRunner(folder, "cpu", max_running=3, one_by_one=True)
    assert at_once.cache.program is not None
    torch.set_num_threads(num_threads)
    try:
        found = logits_of(at_once, [70, 3, 41], chunk)
    finally:
        torch.set_num_threads(1)
    for ours, theirs in zip(found, logits_of(staged, [70, 3, 41], chunk), strict=True):
        assert torch.equal(ours, theirs)
    asked = []
    for runner in (at_once, staged):
        for row, length in enumerate([70, 41]):
            runner.add(row, tokens(row, length, 97), samples=True)
        asked.append(runner.sampled({0: 60, 1: 41}))
    assert torch.equal(*asked)


def test_a_program_says_where_its_time_went(tmp_path: Path) -> None:
    runner = LogitRunner(make_llama(tmp_path), "cpu")
    runner.add(0, [1, 2, 3])
    runner.step({0: 3})
    program = cast("CpuProgram", runner.cache.program)
    program.take_seconds()
    before = time.perf_counter()
    runner.step({0: 1})
    whole = time.perf_counter() - before
    found = program.take_seconds()
    assert min(found.work.norms, found.work.linears, found.work.placing, found.work.attention) > 0
    assert found.waits.total > 0
    assert min(found.entering, found.head) > 0
    assert found.work.total + found.waits.total + found.entering + found.head <= whole
    assert program.take_seconds() == KernelSeconds(NOTHING, NOTHING, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("cache", CACHES)
def test_threads_share_out_splits_without_a_trace(tmp_path: Path, cache: torch.dtype | None) -> None:
    """One long sequence: two threads take its splits one by one, one thread takes them in a row."""
    folder = make_llama(tmp_path, max_position_embeddings=2048)
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        try:
            runner = LogitRunner(folder, "cpu", precision=Precision(cache), max_running=1)
            prompt = tokens(3, 1300, runner.spec.vocab_size)
            found.append(runner.alone(prompt, [1000, 290, *[1] * 10]))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize(("cache", "bound"), [(torch.float16, 0.02), (torch.int8, 0.25)])
def test_what_a_smaller_cache_costs(tmp_path: Path, cache: torch.dtype, bound: float) -> None:
    """Logits move, by no more than the type's share of their spread; and have the same bits alone and in company."""
    folder = make_llama(tmp_path)
    exact, small = (LogitRunner(folder, "cpu", precision=Precision(dtype)) for dtype in (None, cache))
    lengths = [60, 45, 3]
    moved = [
        ((ours - theirs).abs().max() / theirs.std()).item()
        for ours, theirs in zip(logits_of(small, lengths, 9), logits_of(exact, lengths, 9), strict=True)
    ]
    assert 0 < max(moved) < bound
    together = logits_of(small, lengths, 13)
    alone = [small.alone(tokens(row, length, small.spec.vocab_size)) for row, length in enumerate(lengths)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))


def test_keys_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    """The first layer's keys, which no earlier rounding has moved: as torch rounds them, or within half a step."""
    folder = make_llama(tmp_path)
    prompt, cached = tokens(1, 50, 256), []
    for dtype in CACHES:
        runner = LogitRunner(folder, "cpu", precision=Precision(dtype), max_running=1)
        runner.add(0, prompt)
        runner.step({0: 50})
        cached.append((runner, runner.cache[0].keys[list(runner.blocks(0))]))
    exact = cached[0][1].transpose(2, 3)  # [blocks, K, 32, head_dim]
    assert torch.equal(cached[1][1].transpose(2, 3), exact.half())
    blocks, heads, _, head_dim = exact.shape
    raw = cached[2][1]  # [blocks, K, (head_dim + 4) * 32]: bytes, and a scale for each token
    scales = raw[..., head_dim * 32 :].contiguous().view(torch.float32).unsqueeze(-1)
    values = raw[..., : head_dim * 32].view(blocks, heads, head_dim, 32).transpose(2, 3).float() * scales
    assert torch.allclose(scales.squeeze(-1), exact.abs().amax(dim=-1) / 127)
    assert ((values - exact).abs() <= scales * 0.5001).all()


def test_a_smaller_cache_holds_more(tmp_path: Path) -> None:
    """For the same bytes: half for float16; a quarter, and the scales, for int8."""
    folder = str(make_llama(tmp_path, head_dim=64))
    blocks = {
        kv_dtype: Worker.load(
            WorkerOptions(folder, kernels="cpu", kv_dtype=kv_dtype, kv_bytes=1 << 20, max_running=64)
        ).facts.num_blocks
        for kv_dtype in ("float32", "float16", "int8")
    }
    assert blocks["float16"] >= 2 * blocks["float32"]
    assert 4 * blocks["float32"] > blocks["int8"] >= 3.5 * blocks["float32"]


def test_other_kernels_refuse_other_types(tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path))
    with pytest.raises(WorkerError, match=r"only the cpu kernels keep KV .* are 'onednn' on cpu"):
        Worker.load(WorkerOptions(folder, kernels="onednn", kv_dtype="float16"))
    with pytest.raises(WorkerError, match="kv_dtype 'int3' is not supported; known: auto, float32, float16, int8"):
        Worker.load(WorkerOptions(folder, kv_dtype="int3"))
