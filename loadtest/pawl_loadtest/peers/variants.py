"""Who takes part: an engine with its types of weights and KV, and the table it is compared in.

A table holds every variant of its own precision or a higher one, so that no one is beaten by computing more coarsely:
`exact` keeps fp32 KV and the checkpoint's weights as they are and computes in fp32; `fp16` rounds KV (and, in
llama.cpp, activations) to fp16; `coarse` rounds weights or activations to 8 bits or bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pawl_loadtest.peers.bounds import Precision

__all__ = ["BASE", "TABLES", "VARIANTS", "Variant", "choose_variants"]

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

    def precision(self, weights: str) -> Precision:
        """Bytes of a weight and of a number in the KV cache, for a checkpoint with such weights."""
        narrow = 2.0 if weights == "bfloat16" else 4.0
        return Precision(narrow if self.weight_bytes is None else self.weight_bytes, self.kv_bytes)


VARIANTS = (
    Variant("pawl", "pawl", "pawl_engine.py", "exact", 4),
    Variant("transformers generate", "transformers", "transformers_engine.py", "exact", 4, 4),
    Variant(
        "transformers continuous", "transformers", "transformers_engine.py", "exact", 4, 4, {"batching": "continuous"}
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
