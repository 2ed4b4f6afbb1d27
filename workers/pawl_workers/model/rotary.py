"""Rotary position embedding: frequencies of a spec, and the cosines and sines of a step's positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pawl_workers.model.spec import RotarySpec

__all__ = ["rotary_angles", "rotary_frequencies"]


def rotary_frequencies(spec: RotarySpec, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head, [head_dim / 2] float32.

    Source: Su et al., RoFormer, 2021, section 3.4.2; Chen et al., 2023 (linear position interpolation);
    the `llama3` blend is that of Meta's Llama 3.1 reference code.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / spec.theta**exponents
    if spec.kind == "linear":
        frequencies = frequencies / spec.factor
    elif spec.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = spec.low_frequency_factor, spec.high_frequency_factor
        keep = (spec.original_max_position / wavelengths - low) / (high - low)
        blended = (1 - keep) * frequencies / spec.factor + keep * frequencies
        long = wavelengths > spec.original_max_position / low
        short = wavelengths < spec.original_max_position / high
        frequencies = torch.where(long, frequencies / spec.factor, torch.where(short, frequencies, blended))
    return frequencies.to(device)


def rotary_angles(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (the first half negative) of positions [T], each [T, 1, head_dim]."""
    angles = (positions.float().unsqueeze(1) * frequencies).unsqueeze(1)
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), dim=-1).to(dtype), torch.cat((-sines, sines), dim=-1).to(dtype)
