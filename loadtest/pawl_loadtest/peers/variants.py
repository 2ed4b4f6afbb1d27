"""Who takes part: an engine with its types of weights and KV, and the table it is compared in.

A table holds every variant of its own precision or a higher one, so that no one is beaten by computing more coarsely;
the last holds its own and pawl's alone. `exact` keeps fp32 KV and the checkpoint's weights as they are and computes in
fp32; `fp16` rounds KV (and, in llama.cpp, activations) to fp16; `coarse` rounds weights or activations to 8 bits, or
both to bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pawl_loadtest.peers.bounds import Precision

__all__ = ["BASE", "OURS", "TABLES", "VARIANTS", "Variant", "choose_variants"]

OURS = "pawl"
"""The environment of pawl's own variants: this interpreter."""

TABLES: Mapping[str, str] = {
    "exact": "fp32 KV, exact weights",
    "fp16": "fp16 KV",
    "coarse": "8-bit weights, or bf16 throughout",
}
"""From the highest precision to the lowest."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a table."""

    name: str
    environment: str  # a key of `ENVIRONMENTS`, or `pawl`: this interpreter
    engine: str  # a script in `engines`
    table: str
    kv_bytes: float
    weight_bytes: float | None = None  # None: as many as the checkpoint's
    settings: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment of its process
    rounds_inputs: bool = False  # of linear layers, to 16 bits or 8
    paired_with: str | None = None  # the variant that it takes turns with, run by run, both alive

    def precision(self, weights: str) -> Precision:
        """Bytes of a weight and of a number in the KV cache, for a checkpoint with such weights."""
        narrow = 2.0 if weights == "bfloat16" else 4.0
        weight_bytes = narrow if self.weight_bytes is None else self.weight_bytes
        return Precision(weight_bytes, self.kv_bytes, 1 if self.rounds_inputs else 3)


def _llama_cpp(weights: str, kv: str, table: str, weight_bytes: float) -> Variant:
    settings = {"weights": weights, "kv": kv, "flash": "-1"}
    kv_bytes = 4 if kv == "f32" else 2
    return Variant(
        f"llama.cpp {weights}",
        "llama.cpp",
        "llama_cpp_engine.py",
        table,
        kv_bytes,
        weight_bytes,
        settings,
        rounds_inputs=weights == "q8_0",
    )


_EXACT_OPENVINO = {"weights": "f32", "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_FP16_KV = {"kv_dtype": "float16"}
# The client of a server is no part of what is measured but shares its cores. Without gRPC's threads that read its
# sockets, and wake it for each message, it takes a third less of them.
_LIGHT_CLIENT = {"GRPC_EXPERIMENTS": "-event_engine_client"}

VARIANTS = (
    Variant("pawl", "pawl", "pawl_engine.py", "exact", 4),
    Variant(
        "pawl over gRPC",
        "pawl",
        "pawl_server_engine.py",
        "exact",
        4,
        variables=_LIGHT_CLIENT,
        paired_with="pawl",
    ),
    Variant("transformers generate", "transformers", "transformers_engine.py", "exact", 4, 4),
    Variant(
        "transformers continuous", "transformers", "transformers_engine.py", "exact", 4, 4, {"batching": "continuous"}
    ),
    Variant("vllm", "vllm", "vllm_engine.py", "exact", 4, 4, {"type": "float32", "eager": "no"}),
    _llama_cpp("f32", "f32", "exact", 4),
    Variant("openvino", "openvino", "openvino_engine.py", "exact", 4, 4, _EXACT_OPENVINO),
    Variant("pawl fp16 KV", "pawl", "pawl_engine.py", "fp16", 2, settings=_FP16_KV),
    Variant(
        "pawl over gRPC fp16 KV",
        "pawl",
        "pawl_server_engine.py",
        "fp16",
        2,
        settings={"kv-dtype": "float16"},
        variables=_LIGHT_CLIENT,
        paired_with="pawl fp16 KV",
    ),
    _llama_cpp("f16", "f16", "fp16", 2),
    Variant(
        "openvino fp16 KV",
        "openvino",
        "openvino_engine.py",
        "fp16",
        2,
        4,
        _EXACT_OPENVINO | {"KV_CACHE_PRECISION": "f16"},
    ),
    Variant("pawl int8", "pawl", "pawl_engine.py", "coarse", 2, 1, _FP16_KV | {"weight_dtype": "int8"}),
    _llama_cpp("q8_0", "f16", "coarse", 34 / 32),
    Variant("openvino int8", "openvino", "openvino_engine.py", "coarse", 1, 1, {"weights": "int8"}, rounds_inputs=True),
    Variant(
        "vllm bf16",
        "vllm",
        "vllm_engine.py",
        "coarse",
        2,
        2,
        {"type": "bfloat16", "eager": "no"},
        rounds_inputs=True,
    ),
)
"""All of them, pawl's own first."""

BASE: Mapping[str, str] = {"exact": "pawl", "fp16": "pawl fp16 KV", "coarse": "pawl int8"}
"""The variant of pawl that each table compares with the others; the nearest higher precision if it is not available."""


def choose_variants(names: list[str], tables: list[str]) -> list[Variant]:
    """Those of these tables that are named, by environment, by name or by the first words of it; pawl always.

    Raises:
        ValueError: a name is that of none.
    """
    for name in names:
        if not any(_is_meant(variant, name) for variant in VARIANTS):
            known = sorted({variant.environment for variant in VARIANTS} | {variant.name for variant in VARIANTS})
            raise ValueError(f"peer {name!r} is not known; known: all, {', '.join(known)}")
    return [
        variant
        for variant in VARIANTS
        if variant.table in tables
        and (variant.name in BASE.values() or any(_is_meant(variant, name) for name in names))
    ]


def _is_meant(variant: Variant, name: str) -> bool:
    return name in {"all", variant.environment} or f"{variant.name} ".startswith(f"{name} ")
