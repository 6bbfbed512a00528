"""From floats to codes: the grid of a group (scale and zero point) and plain rounding onto it.

For a group w of G elements, b bits, codes q in 0..2^b - 1 and float16 scale s:

    symmetric   z = 2^(b-1) - 1,  s = w_m / 2^(b-1)  with w_m the element of largest magnitude, signed,
                so that w_m takes code 2^b - 1 and all 2^b codes are used
    asymmetric  s = (max - min) / (2^b - 1),  z = round(-min / s), with min <= 0 <= max
    both        q = clamp(round(w / s) + z)

The scale is rounded to float16 before any code is computed, so codes fit the scale that is stored.
`shrink` multiplies the range (clip search); every function takes leading batch dimensions in it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch

from awq_compile.errors import ModelError
from awq_compile.formats import QuantizedMatrix, QuantSpec, quantize_matrix

SMALLEST_SCALE: Final = 2.0**-14  # smallest normal float16: GPUs may flush smaller ones to zero
LARGEST_SCALE: Final = 65504.0


class Grid(NamedTuple):
    """Scale and zero point of every group: (…, N, K/G) float32 tensors that hold float16 and integer values."""

    scale: torch.Tensor
    zero: torch.Tensor


def as_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """(…, N, K) → (…, N, K/G, G)."""
    return weight.reshape(*weight.shape[:-1], -1, group)


def storable(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16 scale that is neither zero, denormal nor infinite, as float32; keeps the sign."""
    size = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(size, scale).half().float()


def plain_grid(weight: torch.Tensor, spec: QuantSpec, shrink: torch.Tensor | float = 1.0) -> Grid:
    """The grid that spans each group's range, times `shrink` (broadcast against (…, N, K/G))."""
    grouped = as_groups(weight, spec.group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if spec.symmetric:
        extreme = torch.where(high >= -low, high, low)
        scale = storable(extreme * shrink / (1 << (spec.bits - 1)))
        return Grid(scale, torch.full_like(scale, float(spec.zero)))
    low, high = low.clamp(max=0.0) * shrink, high.clamp(min=0.0) * shrink
    scale = storable((high - low) / (spec.levels - 1))
    return Grid(scale, torch.round(-low / scale).clamp_(0, spec.levels - 1))


def encode(weight: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    """Nearest codes (…, N, K) as float32."""
    steps = as_groups(weight, spec.group) / grid.scale.unsqueeze(-1)
    return steps.round_().add_(grid.zero.unsqueeze(-1)).clamp_(0, spec.levels - 1).flatten(-2)


def decode(codes: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    """w = (q - z) * s, (…, N, K)."""
    return ((as_groups(codes, spec.group) - grid.zero.unsqueeze(-1)) * grid.scale.unsqueeze(-1)).flatten(-2)


def round_to(weight: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    """`weight` rounded to the nearest values of the grid."""
    return decode(encode(weight, grid, spec), grid, spec)


def pack(codes: torch.Tensor, grid: Grid, spec: QuantSpec, name: str) -> QuantizedMatrix:
    """Codes and grid in stored form; refuses a scale that float16 cannot hold, naming the tensor."""
    if bool((grid.scale.abs() >= LARGEST_SCALE).any()) or not bool(torch.isfinite(grid.scale).all()):
        raise ModelError(f"{name}: a group of weights needs a scale above {LARGEST_SCALE:g}, which float16 cannot hold")
    zeros = None if spec.symmetric else grid.zero.numpy().astype(np.uint8)
    return quantize_matrix(codes.numpy().astype(np.uint8), grid.scale.numpy().astype(np.float16), zeros, spec)
