"""The pure parts of the GPU benchmark: its workload, its bound and its table, and what it does without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pawl_loadtest.gpu_bench.__main__ import main
from pawl_loadtest.gpu_bench.bounds import GpuLimits, byte_bound
from pawl_loadtest.gpu_bench.checkpoint import make_gpu_checkpoint
from pawl_loadtest.gpu_bench.engines import Pawl, Transformers
from pawl_loadtest.gpu_bench.report import Row, table
from pawl_loadtest.gpu_bench.shapes import GPU_SHAPES, RoutedShape
from pawl_loadtest.gpu_bench.workload import Request, describe, mixed_requests, shortened, single_stream
from pawl_loadtest.peers.shapes import SHAPES


def test_the_mixed_workload_is_the_published_one() -> None:
    """256 requests and 133,966 output tokens, as nano-vllm's README counts its benchmark."""
    requests = mixed_requests()
    assert len(requests) == 256
    assert sum(one.output_tokens for one in requests) == 133_966
    assert {len(one.prompt_ids) for one in requests} <= set(range(100, 1025))
    cut = shortened(requests[:3], 50, 4)
    assert [(len(one.prompt_ids), one.output_tokens) for one in cut] == [(50, 4)] * 3
    assert [len(one.prompt_ids) for one in single_stream(7, 2)] == [7]


def test_outputs_are_cut_and_prompts_are_not() -> None:
    whole, cut = mixed_requests(20), mixed_requests(20, 128)
    assert [one.prompt_ids for one in cut] == [one.prompt_ids for one in whole]
    assert [one.output_tokens for one in cut] == [min(one.output_tokens, 128) for one in whole]
    assert describe(mixed_requests(256, 128)) == "256 x 107-1024/103-128"
    assert describe(single_stream(7, 2)) == "1 x 7/2"


def test_the_bound_counts_kv_weights_and_prefill() -> None:
    """By hand for two requests, and 3.67 s for the mixed workload at an H200's measured limits."""
    shape, limits = SHAPES["qwen3-0.6b"], GpuLimits(4.3e12, 790e12)
    two = [Request((1, 2, 3), 2), Request((1,), 4)]
    bound = byte_bound(shape, two, limits)
    assert bound.kv_bytes == (3 * 2 + 2 + 1 * 4 + 8) * 114_688
    assert bound.weight_bytes == 4 * 2 * (shape.layer_weights + shape.head_weights)
    assert bound.prefill_flops == 2 * shape.layer_weights * 4
    by_hand = (bound.kv_bytes + bound.weight_bytes) / 4.3e12 + bound.prefill_flops / 790e12
    assert bound.seconds == pytest.approx(by_hand)
    assert bound.tokens_per_s(two) == pytest.approx(6 / by_hand)
    mixed = byte_bound(shape, mixed_requests(), limits)
    assert mixed.kv_bytes == pytest.approx(13.9e12, rel=0.01)
    assert mixed.seconds == pytest.approx(3.67, abs=0.01)
    assert mixed.tokens_per_s(mixed_requests()) == pytest.approx(36.5e3, rel=0.01)


def test_a_step_reads_the_experts_that_its_rows_choose() -> None:
    """By hand; of 30 billion weights in 48 layers as many are in 8 as published: 3.3 billion of a token in all."""
    shape, limits = GPU_SHAPES["qwen3-30b-a3b-8"], GpuLimits(4e12, 700e12)
    assert isinstance(shape, RoutedShape)
    assert 6 * shape.layer_weights + 2 * shape.head_weights == pytest.approx(3.3e9, rel=0.02)
    assert 6 * shape.weights_read(10**6) + 2 * shape.head_weights == pytest.approx(30.5e9, rel=0.01)
    assert shape.weights_read(1) == pytest.approx(shape.layer_weights)
    all_but_one = (1 - (1 - 8 / 128) ** 3) * 128
    assert shape.weights_read(3) == pytest.approx(shape.shared_weights + 8 * all_but_one * shape.expert_weights)
    # Where all tokens choose the same, no more is read for many than for one.
    same = [[1.0] * 8 + [0.0] * 120] * 8
    assert shape.weights_read(50, same) == shape.weights_read(1, same) == shape.layer_weights
    three = [Request((1, 2), 2), Request((1,), 1), Request((1,), 4)]
    bound = byte_bound(shape, three, limits)
    steps = [3, 2, 1, 1]
    by_hand = sum(2 * (shape.weights_read(rows) + shape.head_weights) for rows in steps)
    assert bound.weight_bytes == pytest.approx(by_hand)
    assert bound.prefill_flops == 2 * shape.layer_weights * 4


def test_eight_billion_weights() -> None:
    """As published: 6.95 billion in the layers, 0.62 billion in the head, and 147,456 bytes of KV a token."""
    shape = SHAPES["qwen3-8b"]
    assert shape.layer_weights == pytest.approx(6.946e9, rel=1e-3)
    assert shape.head_weights == pytest.approx(0.622e9, rel=1e-3)
    assert 2 * shape.kv_per_token == 147_456


def test_the_table_has_shares_and_ratios() -> None:
    row = Row("qwen3-0.6b", "256 x 100-1024", 1000.0, {}, {"pawl": [700.0, 600.0, 650.0], "peer": [70.0, 60.0, 130.0]})
    assert row.fraction("pawl") == 0.65
    assert row.ratios("pawl", "peer") == [10.0, 10.0, 5.0]
    text = table([row])
    assert "650 (600-700)" in text
    assert "65.0%" in text
    assert "pawl / peer: 10.00 (5.00-10.00)" in text


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_both_engines_generate_what_is_asked_for(name: str, tmp_path: Path) -> None:
    """On the CPU, a tiny checkpoint: lengths of each request's own, and tokens that a plain forward pass confirms."""
    shape = GPU_SHAPES[name]
    checkpoint = make_gpu_checkpoint(shape, tmp_path, "cpu")
    assert make_gpu_checkpoint(shape, tmp_path, "cpu") == checkpoint
    requests = [Request(tuple(range(5, 15 + 9 * i)), 3 + 2 * i) for i in range(3)]
    pawl, peer = Pawl(checkpoint, requests, strict=False, device="cpu"), Transformers(checkpoint, device="cpu")
    found, wanted = pawl.run(requests), peer.run(requests)
    for outcome in (found, wanted):
        assert [len(ids) for ids in outcome.token_ids] == [3, 5, 7]
        assert outcome.tokens_per_s == 15 / outcome.seconds
    checked = peer.check(requests, found.token_ids)
    assert len(checked.margins) == 15
    assert max(checked.margins) < 6
    frequencies = checked.frequencies()
    if isinstance(shape, RoutedShape):
        assert frequencies is not None
        assert [len(layer) for layer in frequencies] == [6, 6]
        assert [sum(layer) for layer in frequencies] == pytest.approx([2, 2])
    else:
        assert frequencies is None
    others = [[(token_id + 1) % 512 for token_id in ids] for ids in found.token_ids]
    assert max(peer.check(requests, others).margins) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("figures") / "figures.json"
    assert main(["--json", str(target)]) == 2
    output = capsys.readouterr()
    assert "finds no CUDA device" in output.err
    assert output.out == ""
    assert not target.exists()
