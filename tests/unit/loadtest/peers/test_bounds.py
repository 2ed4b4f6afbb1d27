"""Sizes of models, what a workload asks, and the least time that it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pawl_loadtest.peers.bounds import MachineLimits, Precision, bound
from pawl_loadtest.peers.checkpoint import _architecture
from pawl_loadtest.peers.machine import Machine, instructions
from pawl_loadtest.peers.shapes import SHAPES
from pawl_loadtest.peers.variants import VARIANTS, choose_variants
from pawl_loadtest.peers.workloads import NAMED, Workload, parse_workloads


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_model_that_transformers_makes(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = _architecture(shape)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert shape.layer_weights + shape.head_weights == matrices  # tied: the embedding is the head
    assert shape.kv_per_token == 2 * shape.num_layers * model.config.num_key_value_heads * model.config.head_dim


def test_sizes_as_published() -> None:
    assert (SHAPES["smollm2-135m"].layer_weights + SHAPES["smollm2-135m"].head_weights) / 1e6 == pytest.approx(
        134.5, abs=0.1
    )
    assert (SHAPES["llama-3.2-1b"].layer_weights + SHAPES["llama-3.2-1b"].head_weights) / 1e9 == pytest.approx(
        1.24, abs=0.01
    )
    assert 4 * SHAPES["smollm2-135m"].kv_per_token == 46_080


def test_one_stream_is_bound_by_reading_the_weights() -> None:
    shape, limits = SHAPES["smollm2-135m"], MachineLimits(120e9, 31.7e9, 120e9)
    least = bound(shape, Workload(1, 1, 1001), Precision(4, 0), limits)
    assert 1000 / least.decode_linear.seconds == pytest.approx(31.7e9 / 538e6, rel=0.01)
    half = bound(shape, Workload(1, 1, 1001), Precision(2, 0), limits)
    assert half.decode_linear.seconds * 2 == pytest.approx(least.decode_linear.seconds)


@given(
    st.sampled_from(sorted(SHAPES)),
    st.builds(Workload, st.integers(1, 40), st.integers(1, 60), st.integers(1, 30)),
    st.builds(Precision, st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([1.0, 2.0, 4.0])),
    st.builds(MachineLimits, st.floats(1e9, 1e15), st.floats(1e9, 1e13), st.floats(1e9, 1e15)),
)
def test_bound_equals_a_walk_through_the_steps(
    name: str, workload: Workload, precision: Precision, limits: MachineLimits
) -> None:
    shape = SHAPES[name]
    weights = shape.layer_weights + shape.head_weights
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * precision.kv_bytes

    def attention(num_queries: int, num_read: int, num_pairs: float) -> float:
        flops = num_pairs * shape.num_layers * shape.num_heads * 2 * 2 * shape.head_dim
        return num_queries * max(num_read * kv_bytes / limits.read_bytes, flops / limits.attention_flops)

    keys_and_values = 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
    products = workload.prompt_tokens * (shape.layer_weights * (shape.num_layers - 1) / shape.num_layers)
    products += (workload.prompt_tokens - 1) * keys_and_values + shape.layer_weights / shape.num_layers
    seconds = max(
        2 * workload.requests * (products + shape.head_weights) / limits.flops,
        weights * precision.weight_bytes / limits.read_bytes,
    )
    pairs = sum(position + 1 for position in range(workload.prompt_tokens)) * (shape.num_layers - 1)
    pairs += workload.prompt_tokens  # of the last layer
    seconds += attention(workload.requests, workload.prompt_tokens, pairs / shape.num_layers)
    length = workload.prompt_tokens
    for _ in range(workload.output_tokens - 1):
        length += 1
        seconds += max(
            2 * workload.requests * weights / limits.flops, weights * precision.weight_bytes / limits.read_bytes
        )
        seconds += attention(workload.requests, length, length)
    assert bound(shape, workload, precision, limits).seconds == pytest.approx(seconds)


def test_a_limit_is_what_takes_most_of_the_least_time() -> None:
    shape, precision = SHAPES["smollm2-135m"], Precision(2, 4)
    limits = MachineLimits(100e9, 30e9, 100e9)
    assert bound(shape, NAMED["single"], precision, limits).binds == "read weights"
    assert bound(shape, NAMED["prefill"], precision, limits).binds == "multiply"
    assert bound(shape, Workload(1, 60_000, 16), precision, limits).binds == "attend"
    assert bound(shape, Workload(256, 4096, 4096), precision, MachineLimits(1e15, 30e9, 1e15)).binds == "read KV"


def test_tiles_multiply_exactly_by_three_products_and_never_in_attention() -> None:
    peaks = {"AVX2": 200e9, "AVX-512": 350e9, "AMX": 2400e9}
    machine = Machine(2, peaks, 160e9, {"1": 20e9, "2": 30e9}, "a note")
    assert machine.limits("AMX") == MachineLimits(800e9, 30e9, 350e9)
    assert machine.limits("AMX", tile_products=1) == MachineLimits(2400e9, 30e9, 350e9)
    assert machine.limits("AVX2") == MachineLimits(200e9, 30e9, 200e9)
    assert machine.limits("gemm") == MachineLimits(160e9, 30e9, 160e9)
    assert machine.highest("bfloat16", 2) == ["AMX", "AVX-512"]
    assert machine.highest("float32", 2) == ["AVX-512", "AVX2"]  # tiles would round such weights
    assert "AMX 800 (a third of 2400 of bf16)" in machine.lines()[0]
    products = {variant.name: variant.precision("bfloat16").tile_products for variant in VARIANTS}
    rounding = {"llama.cpp q8_0", "openvino int8", "vllm bf16"}
    assert products == {name: 1 if name in rounding else 3 for name in products}


@pytest.mark.parametrize(
    ("allowed", "found"), [("amx", "AMX"), ("avx512", "AVX-512"), ("avx2", "AVX2"), ("portable", "gemm")]
)
def test_the_own_limit_is_that_of_the_instructions_that_may_be_used(
    allowed: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as this processor has them: of the levels up to the one that is allowed, the highest that it has."""
    levels = ["gemm", "AVX2", "AVX-512", "AMX"]
    monkeypatch.delenv("PAWL_CPU_INSTRUCTIONS", raising=False)
    most = levels.index(instructions("bfloat16"))
    monkeypatch.setenv("PAWL_CPU_INSTRUCTIONS", allowed)
    assert instructions("bfloat16") == levels[min(most, levels.index(found))]
    assert instructions("float32") == levels[min(most, levels.index(found), levels.index("AVX-512"))]


def test_workloads_by_name_and_by_numbers() -> None:
    assert parse_workloads(["single", "3x5/7"]) == [NAMED["single"], Workload(3, 5, 7)]
    assert (NAMED["prefill"].unit, NAMED["prefill"].counted_tokens) == ("prompt tokens/s", 8 * 512)
    assert (NAMED["long"].unit, NAMED["long"].counted_tokens) == ("output tokens/s", 16 * 256)
    for wrong in ("16", "16x128", "0x1/1", "ax1/1"):
        with pytest.raises(ValueError, match="REQUESTSxPROMPT/OUTPUT"):
            parse_workloads([wrong])


def test_prompts_differ_between_rounds_and_repeat_with_the_seed() -> None:
    workload = Workload(3, 9, 1)
    assert workload.prompts(512, 1) == workload.prompts(512, 1) != workload.prompts(512, 2)
    assert [len(prompt) for prompt in workload.prompts(512, 1)] == [9, 9, 9]


def test_variants_by_environment_and_by_name() -> None:
    everyone = choose_variants(["all"], ["exact", "fp16", "coarse"])
    assert everyone == list(VARIANTS)
    chosen = choose_variants(["transformers generate"], ["exact"])
    assert [variant.name for variant in chosen] == ["pawl", "transformers generate"]
    assert {"transformers generate", "transformers continuous"} <= {
        variant.name for variant in choose_variants(["transformers"], ["exact"])
    }
    with pytest.raises(ValueError, match=r"known: all, .*transformers"):
        choose_variants(["tensor"], ["exact"])
