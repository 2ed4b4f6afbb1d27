"""Rotary embeddings as configurations have them: every kind of stretch, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.spec import ModelSpec, RotarySpec

__all__ = ["read_rotaries", "read_rotary"]

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rotary(
    config: ConfigReader, head_dim: int, max_context: int, theta: float, section: ConfigReader | None = None
) -> RotarySpec:
    """Read the rotary embedding, from `section` or from where a configuration has it (transformers 4 and 5).

    Where both `rope_scaling` and `rope_parameters` are there, the former counts, as in transformers: who follows a
    model card's advice on long contexts adds it.
    """
    scaling = section or config.section("rope_scaling") or config.section("rope_parameters") or ConfigReader({})
    for kind in ("full_attention", "sliding_attention"):
        if scaling.section(kind) is not None:
            raise scaling.error(kind, "is not supported: all layers of this architecture turn alike; give one section")
    theta = scaling.positive("rope_theta", config.positive("rope_theta", theta))
    if theta <= 1.0:
        raise config.error("rope_theta", f"must be a number above 1, not {theta}")
    rotary_dim = _rotary_dim(config, scaling, head_dim)
    key = "type" if scaling.text("rope_type", "") == "" else "rope_type"
    kind = scaling.text(key, "default")
    # Beside `rope_scaling` the length before stretching counts more than inside of it, as it does in transformers.
    original = config.integer(
        "original_max_position_embeddings", scaling.integer("original_max_position_embeddings", max_context)
    )
    factor = scaling.positive("factor", max_context / original)
    if kind == "su" or (kind == "yarn" and scaling.numbers("long_factor")):
        kind = "longrope"  # as Phi-3 called it first
    match kind:
        # Dynamic NTK only changes the base beyond max_position_embeddings, where no context goes here.
        case "default" | "dynamic":
            return RotarySpec(theta, rotary_dim)
        case "linear":
            return RotarySpec(theta, rotary_dim, "linear", factor=scaling.positive("factor"))
        case "llama3":
            return _llama3(config, scaling, theta, rotary_dim)
        case "yarn":
            return RotarySpec(
                theta,
                rotary_dim,
                "yarn",
                factor=factor,
                attention_factor=scaling.positive("attention_factor", _yarn_attention_factor(scaling, factor)),
                original_max_position=original,
                beta_slow=scaling.positive("beta_slow", 1.0),
                beta_fast=scaling.positive("beta_fast", 32.0),
                truncate=scaling.flag("truncate", True),
            )
        case "longrope":
            return _longrope(scaling, theta, rotary_dim, max_context, original)
        case _:
            raise scaling.error(key, f"{kind!r} is not supported; known: {', '.join(_KINDS)}")


def read_rotaries(
    config: ConfigReader, base: ModelSpec, theta: float, local_theta: float
) -> tuple[RotarySpec, RotarySpec]:
    """Read those of global and of local layers, of which only the global one is stretched (transformers 4 and 5)."""
    nothing = ConfigReader({})
    both, plain = config.section("rope_parameters") or nothing, config.without("rope_parameters")
    scaling, everywhere = config.section("rope_scaling"), both.section("full_attention") or nothing
    everywhere = everywhere if scaling is None else scaling.over(everywhere)
    local = ConfigReader({"rope_theta": local_theta})
    return (
        read_rotary(plain, base.head_dim, base.max_context, theta, everywhere),
        read_rotary(local, base.head_dim, base.max_context, local_theta, both.section("sliding_attention")),
    )


def _rotary_dim(config: ConfigReader, scaling: ConfigReader, head_dim: int) -> int:
    share = scaling.positive("partial_rotary_factor", config.positive("partial_rotary_factor", 1.0))
    turned = int(head_dim * share)
    if turned % 2 or not 0 < turned <= head_dim:
        raise config.error(
            "partial_rotary_factor",
            f"{share:g} turns {turned} of {head_dim} dimensions of a head; must be an even number of them, not 0",
        )
    return turned


def _llama3(config: ConfigReader, scaling: ConfigReader, theta: float, rotary_dim: int) -> RotarySpec:
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"must be above low_freq_factor, {low:g}, not {high:g}")
    key = "original_max_position_embeddings"
    return RotarySpec(
        theta,
        rotary_dim,
        "llama3",
        factor=scaling.positive("factor"),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_max_position=config.optional_integer(key) or scaling.integer(key),
    )


def _yarn_attention_factor(scaling: ConfigReader, factor: float) -> float:
    def growth(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    share, share_of_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    return growth(share) / growth(share_of_all) if share and share_of_all else growth(1.0)


def _longrope(scaling: ConfigReader, theta: float, rotary_dim: int, max_context: int, original: int) -> RotarySpec:
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    for key, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rotary_dim // 2:
            raise scaling.error(key, f"has {len(factors)} entries; {rotary_dim // 2} pairs turn")
        if min(factors) <= 0.0:
            raise scaling.error(key, f"must hold numbers above 0, not {min(factors):g}")
    factor = scaling.positive("factor", max_context / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RotarySpec(
        theta,
        rotary_dim,
        "longrope",
        attention_factor=scaling.positive("attention_factor", default),
        original_max_position=original,
        short_factors=short,
        long_factors=long,
    )
