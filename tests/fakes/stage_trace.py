"""Names the component that differs from transformers: what each stage of ours gives, and the first that is not theirs.

`reference_trace` has the other side, by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

from pawl_workers import forward
from pawl_workers.batch import Batch
from pawl_workers.kv_cache import LayerCache
from pawl_workers.model.packed import PackedNorm
from pawl_workers.model.weights import AttentionWeights, EmbeddingWeights, ExpertWeights, MlpWeights, Weights
from pawl_workers.model.wrapped_linear import WrappedLinear
from pawl_workers.stages.attention import attend
from pawl_workers.stages.embed import embed
from pawl_workers.stages.mlp import mlp
from pawl_workers.stages.norm import norm
from pawl_workers.stages.residual import add
from tests.fakes.logit_runner import LogitRunner

__all__ = ["StageDifference", "Stages", "first_difference", "trace_runner"]

Stages = Mapping[str, Tensor]

_TOLERANCE = 3e-5  # of the largest value of a stage, or absolute below 1
_IN_LAYER = (
    "attention norm",
    "query-key-value projection",
    "queries, normalised and turned",
    "keys, normalised and turned",
    "attention",
    "attention output projection",
    "attention output norm",
    "residual after attention",
    "mlp norm",
    "expert router",
    "mlp",
    "mlp output norm",
    "residual after mlp",
)


@dataclass(frozen=True, slots=True)
class StageDifference:
    """The first stage that differs.

    Attributes:
        stage: its name.
        worst: largest absolute difference; infinite where only one side has the stage.
        position: the first token that differs.
        found, wanted: the values where they differ most.
    """

    stage: str
    worst: float
    position: int = 0
    found: float = float("nan")
    wanted: float = float("nan")

    def __str__(self) -> str:
        if self.worst == float("inf"):
            return f"{self.stage}: only one side has this stage, or its shape differs"
        return (
            f"{self.stage}: differs by up to {self.worst:.3g} from token {self.position} on "
            f"(found {self.found:.6g}, transformers has {self.wanted:.6g})"
        )


def first_difference(found: Stages, wanted: Stages) -> StageDifference | None:
    """Name the first stage, in the order they run, whose values differ; None where all agree."""
    for stage in _in_order({**found, **wanted}):
        if stage not in found or stage not in wanted or found[stage].shape != wanted[stage].shape:
            return StageDifference(stage, float("inf"))
        ours, theirs = found[stage].flatten(1), wanted[stage].flatten(1)
        distance = (ours - theirs).abs().nan_to_num(nan=torch.inf)
        limit = _TOLERANCE * max(1.0, float(theirs.abs().max()))
        if float(distance.max()) > limit:
            token = int((distance.amax(dim=1) > limit).nonzero()[0])
            at = int(distance.argmax())
            return StageDifference(
                stage, float(distance.max()), token, float(ours.flatten()[at]), float(theirs.flatten()[at])
            )
    return None


def _in_order(stages: Stages) -> list[str]:
    num_layers = 1 + max(int(name.split()[1].rstrip(":")) for name in stages if name.startswith("layer"))
    inside = [f"layer {i}: {name}" for i in range(num_layers) for name in _IN_LAYER]
    return [name for name in ("embedding", *inside, "final norm", "logits") if name in stages]


@dataclass(slots=True)
class _Recorder:
    """Stands in for the stages that `forward` calls, and for what they call in turn."""

    runner: LogitRunner
    row: int
    stages: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    layer: int = -1
    block: str = "attention"

    def record(self, name: str, value: Tensor) -> Tensor:
        self.stages[name] = value.detach().clone().float().cpu()
        return value

    def in_layer(self, name: str, value: Tensor) -> Tensor:
        return self.record(f"layer {self.layer}: {name}", value)

    def name_norms(self, weights: Weights) -> None:
        self.norms[id(weights.final_norm)] = "final norm"
        for i, layer in enumerate(weights.layers):
            self.norms |= {
                id(layer.attention_norm): f"layer {i}: attention norm",
                id(layer.attention_output_norm): f"layer {i}: attention output norm",
                id(layer.mlp_norm): f"layer {i}: mlp norm",
                id(layer.mlp_output_norm): f"layer {i}: mlp output norm",
            }

    def embed(self, batch: Batch, w: EmbeddingWeights) -> Tensor:
        return self.record("embedding", embed(batch, w))

    def norm(self, x: Tensor, w: PackedNorm | None) -> Tensor:
        return x if w is None else self.record(self.norms[id(w)], norm(x, w))

    def attend(self, x: Tensor, w: AttentionWeights, cache: LayerCache, batch: Batch) -> Tensor:
        self.layer, self.block = self.layer + 1, "attention"
        recorded = replace(
            w,
            qkv=_RecordedLinear(w.qkv, self, "query-key-value projection"),
            output=_RecordedLinear(w.output, self, "attention output projection"),
        )
        return attend(x, recorded, _RecordedCache(cache.keys, cache.values, cache.kernels, self), batch)

    def mlp(self, x: Tensor, w: MlpWeights | ExpertWeights) -> Tensor:
        self.block = "mlp"
        if isinstance(w, ExpertWeights):
            w = replace(w, router=_RecordedLinear(w.router, self, "expert router"))
        return self.in_layer("mlp", mlp(x, w))

    def add(self, x: Tensor, update: Tensor, scale: float = 1.0) -> Tensor:
        # Parallel blocks are added up first, under the same name: the last addition of a layer counts.
        return self.in_layer(f"residual after {self.block}", add(x, update, scale))


@dataclass(frozen=True, slots=True)
class _RecordedLinear(WrappedLinear):
    recorder: _Recorder
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.recorder.in_layer(self.name, self.linear(x))


@dataclass(frozen=True)
class _RecordedCache(LayerCache):
    recorder: _Recorder

    def place(self, heads: Tensor, w: AttentionWeights, batch: Batch) -> Tensor:
        q = LayerCache.place(self, heads, w, batch)
        recorder = self.recorder
        recorder.in_layer("keys, normalised and turned", recorder.runner.keys(recorder.row, recorder.layer, len(heads)))
        return recorder.in_layer("queries, normalised and turned", q)

    def attend(self, q: Tensor, w: AttentionWeights, batch: Batch) -> Tensor:
        return self.recorder.in_layer("attention", LayerCache.attend(self, q, w, batch).flatten(1))


def trace_runner(runner: LogitRunner, token_ids: list[int]) -> Stages:
    """Run a sequence in one step and return what each stage of our forward pass gives, each [tokens, ...]."""
    recorder = _Recorder(runner, row=0)
    recorder.name_norms(runner.weights)
    runner.add(0, token_ids)
    stages = {name: getattr(recorder, name) for name in ("embed", "norm", "attend", "mlp", "add")}
    # Stage after stage: a backend's program of all layers has the same bits, but not the stages to look at.
    with mock.patch.multiple(forward, **stages), mock.patch.object(runner.cache, "program", None):
        recorder.record("logits", runner.step({0: len(token_ids)})[0])
    runner.free(0)
    final = runner.weights.final_norm
    recorder.record("final norm", norm(recorder.stages[f"layer {recorder.layer}: residual after mlp"], final))
    return recorder.stages
