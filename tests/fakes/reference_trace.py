"""What each module of a transformers model gives, by the names that `stage_trace` has for our stages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tests.fakes.logit_runner import LogitRunner
from tests.fakes.stage_trace import Stages, first_difference, trace_runner

__all__ = ["explain_mismatch", "trace_reference"]

_AROUND = {"pre_feedforward_layernorm": "mlp norm", "post_feedforward_layernorm": "mlp output norm"}
_BEFORE = {
    "input_layernorm": "attention norm",
    "post_attention_layernorm": "mlp norm",
    "ln_1": "attention norm",
    "ln_2": "mlp norm",
}
_AFTER = {**_BEFORE, **_AROUND, "post_attention_layernorm": "attention output norm"}
_FOUR = {**_BEFORE, "post_self_attn_layernorm": "attention output norm", "post_mlp_layernorm": "mlp output norm"}
_PARALLEL = ("phi", "cohere", "cohere2")
_INTERLEAVED = ("cohere", "cohere2", "glm", "glm4")

Found = dict[str, Tensor]


def explain_mismatch(runner: LogitRunner, model: PreTrainedModel, token_ids: list[int]) -> str:
    """Say which component differs from transformers first."""
    difference = first_difference(trace_runner(runner, token_ids), trace_reference(model, token_ids))
    found = "every stage agrees when all is computed in one step: chunks matter" if difference is None else difference
    return f"{runner.kernels.name} kernels: {found}"


def trace_reference(model: PreTrainedModel, token_ids: list[int]) -> Stages:
    """Run a sequence through transformers with hooks on its modules; each stage is [tokens, ...]."""
    found: Found = {}
    with ExitStack() as stack, torch.no_grad():
        for hook in _hooks(model, found):
            stack.callback(hook.remove)
        stack.enter_context(_recorded_attention(model, found))
        found["logits"] = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return {name: value.float() for name, value in _merged(model, found).items()}


def _text_part(model: PreTrainedModel) -> nn.Module:
    found = getattr(model.base_model, "language_model", model.base_model)
    assert isinstance(found, nn.Module)
    return found


def _hooks(model: PreTrainedModel, found: Found) -> Iterator[RemovableHandle]:
    base = _text_part(model)
    layers = _child(base, "layers", "h")
    assert isinstance(layers, nn.ModuleList)
    yield _before(layers[0], found, "embedding")
    yield _after(_child(base, "norm", "final_layer_norm", "final_layernorm", "ln_f"), found, "final norm")
    is_parallel = getattr(model.config, "use_parallel_residual", model.config.model_type in _PARALLEL)
    for i, layer in enumerate(layers):
        at = f"layer {i}: "
        yield from _layer_hooks(layer, found, at, is_parallel=is_parallel)
        yield _after(layer, found, at + "residual after mlp")


def _layer_hooks(layer: nn.Module, found: Found, at: str, *, is_parallel: bool) -> Iterator[RemovableHandle]:
    norms = _AFTER if hasattr(layer, "post_feedforward_layernorm") else _BEFORE
    norms = _FOUR if hasattr(layer, "post_self_attn_layernorm") else norms
    modules = {norms[name]: module for name, module in layer.named_children() if name in norms}
    for name, module in modules.items():
        yield _after(module, found, at + name)
    mlp = _child(layer, "mlp")
    if not is_parallel:
        yield _before(modules.get("mlp norm", mlp), found, at + "residual after attention")
    yield _after(mlp, found, at + "mlp")
    if hasattr(mlp, "gate"):
        yield _after(_child(mlp, "gate"), found, at + "expert router")
    attention = _child(layer, "self_attn", "attention", "attn")
    for part in ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"):
        if hasattr(attention, part):
            yield _after(getattr(attention, part), found, at + part)
    yield _after(_child(attention, "o_proj", "dense", "c_proj"), found, at + "attention output projection")


def _child(module: nn.Module, *names: str) -> nn.Module:
    found = next(getattr(module, name) for name in names if hasattr(module, name))
    assert isinstance(found, nn.Module)
    return found


def _rows(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The one sequence of a batch: [tokens, width]."""
    first = value[0] if isinstance(value, tuple) else value
    return first.detach().clone().view(-1, first.shape[-1])


def _after(module: nn.Module, found: Found, name: str) -> RemovableHandle:
    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found[name] = _rows(output)

    return module.register_forward_hook(keep)


def _before(module: nn.Module, found: Found, name: str) -> RemovableHandle:
    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = _rows(inputs)

    return module.register_forward_pre_hook(keep)


Attention = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def _recorded_attention(model: PreTrainedModel, found: Found) -> Iterator[None]:
    """Keep what the attention function of the model's own file gets and gives."""
    file = sys.modules[type(_text_part(model)).__module__]
    attend: Attention = file.eager_attention_forward

    def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> object:
        output, weights = attend(module, query, key, value, *args, **kwargs)
        at = f"layer {module.layer_idx}: "
        found[at + "queries, normalised and turned"] = query[0].transpose(0, 1).clone()
        found[at + "keys, normalised and turned"] = key[0].transpose(0, 1).clone()
        found[at + "attention"] = output[0].clone().flatten(1)  # [tokens, H * head_dim]
        return output, weights

    with mock.patch.object(file, "eager_attention_forward", keep):
        yield


def _merged(model: PreTrainedModel, found: Found) -> Found:
    """Put the projections of each layer together as ours are: queries, then keys, then values."""
    if model.config.model_type in _INTERLEAVED:
        found = {name: _apart(model, name, value) for name, value in found.items()}
    stages: Found = {}
    for name, value in found.items():
        at, _, part = name.rpartition(": ")
        target = f"{at}: query-key-value projection"
        match part:
            case "q_proj":
                stages[target] = torch.cat([found[f"{at}: {one}"] for one in ("q_proj", "k_proj", "v_proj")], dim=1)
            case "k_proj" | "v_proj":
                pass
            case "qkv_proj" | "c_attn":
                stages[target] = value
            case "query_key_value":  # head after head
                heads = value.view(len(value), model.config.num_attention_heads, 3, -1)
                stages[target] = heads.transpose(1, 2).reshape(value.shape)
            case _:
                stages[name] = value
    return stages


def _apart(model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
    """Queries and keys in the order of ours: the first of each pair of dimensions that turn, then the second."""
    if not name.endswith(("q_proj", "k_proj", "turned")):
        return value
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = torch.arange(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    order = torch.cat([turned[::2], turned[1::2], torch.arange(len(turned), head_dim)])
    return value.view(len(value), -1, head_dim)[..., order].reshape(value.shape)
