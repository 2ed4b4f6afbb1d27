"""A mismatch with transformers is traced to the component that causes it: every planted fault is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pawl_workers.model.checkpoint_config import CheckpointConfig, read_config
from pawl_workers.model.spec import Activation, LayerSpec, ModelSpec, TensorTarget
from tests.fakes.families import MAX_POSITIONS, Draft, write_checkpoint
from tests.fakes.logit_runner import LogitRunner
from tests.fakes.reference_trace import trace_reference
from tests.fakes.stage_trace import first_difference, trace_runner

WINDOW = 7

Plant = Callable[[CheckpointConfig], CheckpointConfig]


def draft(architecture: str, config_class: str, **values: object) -> Draft:
    common: dict[str, object] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return Draft(architecture, config_class, common | values, torch.float32, seed=5)


PHI3 = draft(
    "Phi3ForCausalLM",
    "Phi3Config",
    rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
)
GEMMA2 = draft(
    "Gemma2ForCausalLM",
    "Gemma2Config",
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=WINDOW,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0,
)
GEMMA3 = draft(
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=WINDOW,
    sliding_window_pattern=2,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
)
GRANITE = draft("GraniteForCausalLM", "GraniteConfig", residual_multiplier=0.5, logits_scaling=2.0)
QWEN3 = draft("Qwen3ForCausalLM", "Qwen3Config", head_dim=10)
MOE = draft(
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    mlp_only_layers=[0],
    head_dim=8,
)
SHARED = draft(
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=20,
)
NEOX = draft("GPTNeoXForCausalLM", "GPTNeoXConfig", num_key_value_heads=4)
OLMO2 = draft("Olmo2ForCausalLM", "Olmo2Config")
COHERE = draft("CohereForCausalLM", "CohereConfig", logit_scale=0.25)
PHI = draft("PhiForCausalLM", "PhiConfig", num_key_value_heads=4)
GLM4 = draft("Glm4ForCausalLM", "Glm4Config", head_dim=12)
SMOLLM3 = draft("SmolLM3ForCausalLM", "SmolLM3Config", no_rope_layer_interval=2)
GPT2 = Draft(
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": 101,
        "n_embd": 30,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": MAX_POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    torch.float32,
    seed=5,
)


def in_spec(change: Callable[[ModelSpec], ModelSpec]) -> Plant:
    return lambda config: replace(config, spec=change(config.spec))


def in_names(ending: str, change: Callable[[TensorTarget], TensorTarget]) -> Plant:
    def plant(config: CheckpointConfig) -> CheckpointConfig:
        names = {
            name: change(target) if name.endswith(ending) else target
            for name, target in config.family.names(config.spec).items()
        }
        return replace(config, family=replace(config.family, names=lambda _: names))

    return plant


def every_layer(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    return replace(spec, layers=tuple(change(layer) for layer in spec.layers))


FAULTS: dict[str, tuple[Draft, Plant, str, int]] = {
    "wrong rotary dimensions": (
        PHI3,
        in_spec(lambda s: replace(s, rotaries=(replace(s.rotaries[0], rotary_dim=8),))),
        "layer 0: queries, normalised and turned",
        1,  # at position 0 nothing turns
    ),
    "wrong softcap of scores": (GEMMA2, in_spec(lambda s: replace(s, attention_softcap=2.5)), "layer 0: attention", 1),
    "wrong softcap of logits": (GEMMA2, in_spec(lambda s: replace(s, logit_softcap=4.0)), "logits", 0),
    "missing norm offset": (
        GEMMA2,
        in_names("input_layernorm.weight", lambda target: replace(target, added=0.0)),
        "layer 0: attention norm",
        0,
    ),
    "missing embedding scale": (GEMMA2, in_spec(lambda s: replace(s, embedding_scale=1.0)), "embedding", 0),
    "window too wide by one": (
        GEMMA2,
        in_spec(lambda s: every_layer(s, lambda layer: replace(layer, window=layer.window and layer.window + 1))),
        "layer 0: attention",
        WINDOW,
    ),
    "wrong scale of scores": (QWEN3, in_spec(lambda s: replace(s, attention_scale=0.25)), "layer 0: attention", 1),
    "local rotary everywhere": (
        GEMMA3,
        in_spec(lambda s: every_layer(s, lambda layer: replace(layer, rotary=1))),
        "layer 1: queries, normalised and turned",
        1,
    ),
    "offset of one key norm": (
        QWEN3,
        in_names("layers.1.self_attn.k_norm.weight", lambda target: replace(target, added=1.0)),
        "layer 1: keys, normalised and turned",
        0,
    ),
    "every layer turns": (
        SMOLLM3,
        in_spec(lambda s: every_layer(s, lambda layer: replace(layer, rotary=0))),
        "layer 1: queries, normalised and turned",
        1,
    ),
    "wrong residual multiplier": (
        GRANITE,
        in_spec(lambda s: replace(s, residual_scale=1.0)),
        "layer 0: residual after attention",
        0,
    ),
    "wrong logit divisor": (GRANITE, in_spec(lambda s: replace(s, logit_divisor=1.0)), "logits", 0),
    "expert shares not normalised": (
        MOE,
        in_spec(lambda s: replace(s, experts=s.experts and replace(s.experts, normalised=False))),
        "layer 1: mlp",
        0,
    ),
    "too few experts": (
        MOE,
        in_spec(lambda s: replace(s, experts=s.experts and replace(s.experts, num_active=1))),
        "layer 1: mlp",
        0,
    ),
    "wrong share of the shared expert": (
        SHARED,
        in_names("layers.1.mlp.shared_expert_gate.weight", lambda target: replace(target, added=1.0)),
        "layer 1: mlp",
        0,
    ),
    "head after head not taken apart": (
        NEOX,
        in_names("query_key_value.weight", lambda target: replace(target, heads=0)),
        "layer 0: query-key-value projection",
        0,
    ),
    "blocks one after the other": (
        NEOX,
        in_spec(lambda s: replace(s, parallel_blocks=False)),
        "layer 0: residual after attention",
        0,
    ),
    "pairs left side by side": (
        COHERE,
        in_names("self_attn.q_proj.weight", lambda target: replace(target, interleaved=None)),
        "layer 0: query-key-value projection",
        0,
    ),
    "pairs apart by half a head": (
        GLM4,
        in_names(
            "k_proj.weight",
            lambda t: replace(t, interleaved=t.interleaved and replace(t.interleaved, rotary_dim=12)),
        ),
        "layer 0: query-key-value projection",
        0,
    ),
    "one norm for two": (PHI, in_spec(lambda s: replace(s, norm_epsilon=1e-2)), "layer 0: attention norm", 0),
    "wrong scale of logits": (COHERE, in_spec(lambda s: replace(s, logit_divisor=2.0)), "logits", 0),
    "SiLU for GELU": (PHI, in_spec(lambda s: replace(s, activation=Activation.SILU)), "layer 0: mlp", 0),
    "norm before its block": (
        OLMO2,
        in_names("post_attention_layernorm.weight", lambda t: replace(t, slot=t.slot.replace("_output", ""))),
        "layer 0: attention norm",
        0,
    ),
    "exact GELU for the approximate one": (
        GPT2,
        in_spec(lambda s: replace(s, activation=Activation.GELU)),
        "layer 0: mlp",
        0,
    ),
    "wrong epsilon": (GPT2, in_spec(lambda s: replace(s, norm_epsilon=1e-2)), "layer 0: attention norm", 0),
}


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(tmp_path: Path, fault: str, kernels: str) -> None:
    """Without the fault no stage differs; with it, the first that does is the one it lies in."""
    checkpoint, plant, stage, position = FAULTS[fault]
    if kernels == "cpu" and checkpoint is GPT2:
        kernels = "onednn"  # for its odd head dimensions
    model = write_checkpoint(tmp_path, checkpoint)
    token_ids = random.Random(3).choices(range(101), k=70)
    wanted = trace_reference(model, token_ids)
    sound = trace_runner(LogitRunner(tmp_path, kernels, max_running=1), token_ids)
    assert first_difference(sound, wanted) is None
    faulty = LogitRunner(tmp_path, kernels, max_running=1, config=plant(read_config(tmp_path)))
    difference = first_difference(trace_runner(faulty, token_ids), wanted)
    assert difference is not None
    assert difference.stage == stage, str(difference)
    assert difference.position == position, str(difference)
