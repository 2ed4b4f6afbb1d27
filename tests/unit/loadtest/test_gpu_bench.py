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


def test_both_engines_generate_what_is_asked_for(tmp_path: Path) -> None:
    """On the CPU, a tiny checkpoint: lengths of each request's own, and tokens that a plain forward pass confirms."""
    checkpoint = make_gpu_checkpoint(SHAPES["tiny"], tmp_path, "cpu")
    requests = [Request(tuple(range(5, 15 + 9 * i)), 3 + 2 * i) for i in range(3)]
    pawl, peer = Pawl(checkpoint, requests, strict=False, device="cpu"), Transformers(checkpoint, device="cpu")
    found, wanted = pawl.run(requests), peer.run(requests)
    for outcome in (found, wanted):
        assert [len(ids) for ids in outcome.token_ids] == [3, 5, 7]
        assert outcome.tokens_per_s == 15 / outcome.seconds
    margins = peer.margins(requests, found.token_ids)
    assert len(margins) == 15
    assert max(margins) < 6
    others = [[(token_id + 1) % 512 for token_id in ids] for ids in found.token_ids]
    assert max(peer.margins(requests, others)) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("figures") / "figures.json"
    assert main(["--json", str(target)]) == 2
    output = capsys.readouterr()
    assert "finds no CUDA device" in output.err
    assert output.out == ""
    assert not target.exists()
