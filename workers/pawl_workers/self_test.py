"""The self test of a loaded worker: generates over paged KV in chunks, then checks against the reference kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pawl_workers.batch import AttentionLayout, Batch, PromptRows, SamplingBatch, SequenceArrays
from pawl_workers.errors import SelfTestError
from pawl_workers.forward import forward
from pawl_workers.kernels.reference import ReferenceActivation, ReferenceKernels, ReferenceNorm
from pawl_workers.kv_cache import KvCache
from pawl_workers.model.packed import PackedNorm
from pawl_workers.model.rotary import rotary_angles
from pawl_workers.model.weights import ExpertWeights, LayerWeights, MlpWeights, QueryKeyNormWeights, Weights
from pawl_workers.model.wrapped_linear import WrappedLinear
from pawl_workers.plan import NewSequence, SamplingSpec, StepPlan, StepResult, TokenLogprobs
from pawl_workers.prepare import BatchSettings
from pawl_workers.sampling.table import SamplingTable

__all__ = ["SelfTest", "run_self_test"]

_PROMPT_TOKENS = 24
_NEW_TOKENS = 8
_CHUNK = 7  # crosses block and tile boundaries at odd places
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
_NARROW_CACHE_TOLERANCE = 1e-2  # what lies between two values of a cache may be rounded to either


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a passed self test found."""

    num_tokens: int
    max_difference: float  # of log-probabilities, in nats
    tolerance: float
    duration_s: float


class _AsCached(ReferenceKernels):
    """Keys and values rounded as a cache of a narrower type keeps them: what that costs is no fault."""

    def __init__(self, device: torch.device, cache_dtype: torch.dtype) -> None:
        super().__init__(device)
        self._cache_dtype = cache_dtype

    def place(
        self,
        heads: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        norms: QueryKeyNormWeights | None,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Place, then round."""
        queries = super().place(heads, rotary, norms, keys, values, layout)
        for cache in (keys, values):
            cache.copy_(_rounded(cache, self._cache_dtype))
        return queries


def _rounded(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of a type gives back of vectors, [..., head_dim]; bytes have one scale for each."""
    if dtype is not torch.int8:
        return vectors.to(dtype).to(vectors.dtype)
    scale = vectors.abs().amax(dim=-1, keepdim=True) / 127.0
    return (vectors / scale.masked_fill(scale == 0, 1.0)).round() * scale


@dataclass(frozen=True, slots=True)
class _UnpackedLinear(WrappedLinear):
    """A packed layer computed by `F.linear`, unpacked at each call: needs memory for one layer at a time."""

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.unpack(), self.bias)


def run_self_test(
    execute: Callable[[StepPlan], StepResult],
    epoch: int,
    weights: Weights,
    settings: BatchSettings,
    max_context: int,
    num_blocks: int,
    bos_token_id: int | None,
) -> SelfTest:
    """Generate greedily through `execute`, whose rows must be empty, and compare with the reference.

    Raises:
        SelfTestError: a log-probability differs from the reference by more than the tolerance.
    """
    started = time.perf_counter()
    longest = min(max_context, num_blocks * settings.kernels.block_size)
    num_new = min(_NEW_TOKENS, longest - 1)
    if num_new < 1:
        raise SelfTestError(f"a context of {longest} tokens is too short for a self test")
    num_prompt = min(_PROMPT_TOKENS, longest - num_new)
    prompt = [(7 + 31 * i) % weights.spec.vocab_size for i in range(num_prompt)]
    if bos_token_id is not None:
        prompt[0] = bos_token_id
    found = _generate(execute, epoch, prompt, num_new, settings.kernels.block_size)
    token_ids = prompt + [entry.token_id for entry in found]
    with torch.inference_mode():
        wanted = _reference(weights, settings, token_ids, num_prompt)
    differences = [abs(a.logprob - b.logprob) for a, b in zip(found, wanted, strict=True)]
    # A greedy token must also be the reference's best, but for rounding.
    differences += [entry.alternative_logprobs[0] - entry.logprob for entry in wanted]
    worst, tolerance = float(np.max(differences)), _TOLERANCES[settings.dtype]  # unlike max, nan if any is
    if settings.kernels.cache_dtype(settings.dtype).itemsize < settings.dtype.itemsize:
        tolerance = max(tolerance, _NARROW_CACHE_TOLERANCE)
    if not worst <= tolerance:  # also when it is not a number
        raise SelfTestError(
            f"log-probabilities of the {settings.kernels.name} kernels differ from the reference by up to "
            f'{worst:.3g}, tolerance {tolerance:.3g}; start with kernels = "reference" and report this'
        )
    return SelfTest(len(found), worst, tolerance, time.perf_counter() - started)


def _generate(
    execute: Callable[[StepPlan], StepResult], epoch: int, prompt: list[int], num_new: int, block_size: int
) -> list[TokenLogprobs]:
    # The last generated token is never fed, so its place needs no block.
    num_needed = -(-(len(prompt) + num_new - 1) // block_size)
    sequence = NewSequence(
        row=0,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        num_computed=0,
        block_ids=list(range(num_needed, 0, -1)),
        sampling=SamplingSpec(temperature=0.0, logprobs=0),
    )
    found: list[TokenLogprobs] = []
    computed = step = 0
    while len(found) < num_new:
        step += 1
        grant = min(_CHUNK, len(prompt) + len(found) - computed)
        new = [sequence] if step == 1 else []
        result = execute(StepPlan(step, epoch, [], new, [], [0], [grant]))
        if result.failures:
            raise SelfTestError(f"the self test failed: {result.failures[0].message}")
        found += [entry for entry in result.logprobs if entry is not None]
        computed += grant
    return found


def _reference(weights: Weights, settings: BatchSettings, token_ids: list[int], num_prompt: int) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids[num_prompt:]`, all computed in one step by the reference kernels."""
    device, num_tokens = settings.device, len(token_ids) - 1
    kernels = _AsCached(device, settings.kernels.cache_dtype(settings.dtype))
    num_blocks = -(-num_tokens // kernels.block_size)
    cache = KvCache.allocate(weights.spec, kernels, num_blocks, device, settings.dtype)
    positions = np.arange(num_tokens)
    arrays = SequenceArrays(
        starts=np.zeros(1, dtype=np.int64),
        lengths=np.array([num_tokens]),
        contexts=np.array([num_tokens]),
        positions=positions,
        sequence_of_token=np.zeros(num_tokens, dtype=np.int64),
        block_tables=np.arange(1, num_blocks + 1)[None, :],
    )
    none = np.zeros(0, dtype=np.int64)
    tensor_positions = torch.from_numpy(positions).to(device)
    targets = np.array(token_ids[num_prompt:])
    batch = Batch(
        token_ids=torch.tensor(token_ids[:-1], device=device),
        positions=tensor_positions,
        rotary=tuple(rotary_angles(table, tensor_positions, settings.dtype) for table in settings.rotaries),
        attention=kernels.lay_out(arrays, settings.shape),
        last=torch.zeros(0, dtype=torch.int64, device=device),
        sampling=SamplingBatch(kernels.sampler, SamplingTable(0), none, none, none, none.reshape(0, 0)),
        prompts=[PromptRows(0, num_prompt - 1, num_prompt, targets, 1)],
    )
    return forward(batch, _unpacked(weights), cache).prompts[0].positions


def _unpacked(weights: Weights) -> Weights:
    return replace(
        weights,
        layers=tuple(_unpacked_layer(layer) for layer in weights.layers),
        final_norm=ReferenceNorm(weights.final_norm.weights),
        head=replace(weights.head, linear=_UnpackedLinear(weights.head.linear)),
    )


def _unpacked_layer(layer: LayerWeights) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    return replace(
        layer,
        attention=replace(attention, qkv=_UnpackedLinear(attention.qkv), output=_UnpackedLinear(attention.output)),
        mlp=_unpacked_mlp(mlp) if isinstance(mlp, MlpWeights) else _unpacked_experts(mlp),
        attention_norm=_unpacked_norm(layer.attention_norm),
        attention_output_norm=_unpacked_norm(layer.attention_output_norm),
        mlp_norm=_unpacked_norm(layer.mlp_norm),
        mlp_output_norm=_unpacked_norm(layer.mlp_output_norm),
    )


def _unpacked_experts(w: ExpertWeights) -> ExpertWeights:
    shared = w.shared
    if shared is not None:
        shared = replace(shared, mlp=_unpacked_mlp(shared.mlp), gate=_UnpackedLinear(shared.gate))
    experts = tuple(_unpacked_mlp(expert) for expert in w.experts)
    return replace(w, router=_UnpackedLinear(w.router), experts=experts, shared=shared, together=None)


def _unpacked_mlp(mlp: MlpWeights) -> MlpWeights:
    activate = ReferenceActivation(mlp.activation, mlp.gated)
    return replace(mlp, up=_UnpackedLinear(mlp.up), activate=activate, down=_UnpackedLinear(mlp.down))


def _unpacked_norm(norm: PackedNorm | None) -> PackedNorm | None:
    return None if norm is None else ReferenceNorm(norm.weights)
