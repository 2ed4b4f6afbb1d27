"""Rotary position embedding: frequencies of a spec, and the cosines and sines of a step's positions."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pawl_workers.model.spec import RotarySpec

__all__ = ["RotaryTable", "rotary_angles", "rotary_table"]

log = logging.getLogger(__name__)


_KEPT_BYTES = 1 << 22
"""Memory for the angles of the first positions, 8192 of them where 64 dimensions turn."""


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """What the angles of a rotary embedding are worked out from.

    Attributes:
        frequencies: radians per position of each pair of dimensions, [rotary_dim / 2] float32.
        scale: a factor of cosines and sines.
        cosines, sines: those of the first positions, as of `rotary_angles`, [positions, rotary_dim] float32: on a CPU
            it takes a short step longer to work angles out than to look them up.
    """

    frequencies: Tensor
    scale: float
    cosines: Tensor
    sines: Tensor


def rotary_table(spec: RotarySpec, max_context: int, device: torch.device) -> RotaryTable:
    """Work out the frequencies of a spec.

    Of `longrope`'s two sets of factors a server uses one, by the longest context that it serves: were each sequence to
    change from one to the other as it grows, its cached keys would no longer be those of its positions.

    Source: Su et al., RoFormer, 2021, section 3.4.2; Chen et al., 2023 (linear position interpolation); Peng et al.,
    YaRN, 2023, section 3.2; Ding et al., LongRoPE, 2024; the `llama3` blend is that of Meta's Llama 3.1 reference code.
    """
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / spec.theta**exponents
    match spec.kind:
        case "linear":
            frequencies = frequencies / spec.factor
        case "llama3":
            frequencies = _blend_by_wavelength(spec, frequencies)
        case "yarn":
            frequencies = _blend_by_rotations(spec, frequencies)
        case "longrope":
            is_long = max_context > spec.original_max_position
            if is_long:
                log.warning(
                    "short texts too are computed with the frequencies for more than %d tokens, since contexts go up "
                    "to %d here; with max_context = %d they are as the model was first trained",
                    *(spec.original_max_position, max_context, spec.original_max_position),
                )
            factors = spec.long_factors if is_long else spec.short_factors
            frequencies = 1.0 / (torch.tensor(factors) * spec.theta**exponents)
    num_kept = min(max_context, _KEPT_BYTES // (8 * spec.rotary_dim)) if device.type == "cpu" else 0
    cosines, sines = _angles(frequencies, spec.attention_factor, torch.arange(num_kept))
    return RotaryTable(frequencies.to(device), spec.attention_factor, cosines, sines)


def _blend_by_wavelength(spec: RotarySpec, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    keep = (spec.original_max_position / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / spec.factor + keep * frequencies
    long = wavelengths > spec.original_max_position / low
    short = wavelengths < spec.original_max_position / high
    return torch.where(long, frequencies / spec.factor, torch.where(short, frequencies, blended))


def _blend_by_rotations(spec: RotarySpec, frequencies: Tensor) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """The pair that turns so often over the original context."""
        wavelength = spec.original_max_position / (times * 2 * math.pi)
        return spec.rotary_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    first, last = pair_that_turns(spec.beta_fast), pair_that_turns(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.rotary_dim - 1)
    if first == last:
        last += 0.001  # a step, not a division by zero
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return frequencies / spec.factor * ramp + frequencies * (1 - ramp)


def rotary_angles(
    table: RotaryTable, positions: Tensor, dtype: torch.dtype, furthest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (the first half negative) of positions [T], each [T, 1, rotary_dim].

    Args:
        table: of the embedding.
        positions: where tokens stand.
        dtype: of the model.
        furthest: at least the largest position; where it is known and small, angles are looked up, with the same bits.
    """
    if furthest is not None and furthest < table.cosines.shape[0]:
        cosines, sines = table.cosines.index_select(0, positions), table.sines.index_select(0, positions)
    else:
        cosines, sines = _angles(table.frequencies, table.scale, positions)
    return cosines.unsqueeze(1).to(dtype), sines.unsqueeze(1).to(dtype)


def _angles(frequencies: Tensor, scale: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float().unsqueeze(1) * frequencies
    cosines, sines = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)
