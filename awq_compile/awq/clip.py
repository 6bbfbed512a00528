"""The search for each group's range, by its own block of the Gram matrix.

For row n and group g with values w (G,) and block H_g of H, pick the range factor f that minimises

    (w - Q_f(w)) H_g (w - Q_f(w))ᵀ

over AWQ's shrinking factors 1, 0.95, …, 0.5. Departure from the paper: symmetric formats also try factors above
1, because the side opposite the largest element has one step less, and would be cut where both sides reach far.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from awq_compile.awq.rounding import Grid, as_groups, plain_grid, round_to
from awq_compile.formats import QuantSpec

_SHRINK: Final = tuple(1 - step / 20 for step in range(11))


class Clipped(NamedTuple):
    """The chosen grid, and the fraction of groups whose range was shrunk."""

    grid: Grid
    fraction: float


def factors(spec: QuantSpec) -> tuple[float, ...]:
    """Range factors, 1 first."""
    steps = 1 << (spec.bits - 1)
    full = steps / (steps - 1)  # the opposite side reaches as far as the largest element
    wider = tuple(1 + (full - 1) * step / 4 for step in range(1, 5)) if spec.symmetric and spec.bits < 8 else ()
    return _SHRINK + wider


def block_error(delta: torch.Tensor, blocks: torch.Tensor | None, group: int) -> torch.Tensor:
    """(N, K/G): δ H_g δᵀ of every row and group; `delta` (N, K), `blocks` (K/G, G, G), None for H = I."""
    if blocks is None:
        return as_groups(delta, group).square().sum(-1)
    grouped = as_groups(delta, group).transpose(0, 1)  # (K/G, N, G)
    return ((grouped @ blocks) * grouped).sum(-1).T


def diagonal_blocks(gram: torch.Tensor, group: int) -> torch.Tensor:
    """(K/G, G, G) blocks on the diagonal of a (K, K) matrix."""
    k = gram.shape[0]
    index = torch.arange(k // group)
    return gram.reshape(k // group, group, k // group, group)[index, :, index, :]


def search_range(weight: torch.Tensor, gram: torch.Tensor | None, spec: QuantSpec) -> Clipped:
    """The best range factor for every row and group of `weight` (N, K), given H of its inputs (None: the identity)."""
    blocks = None if gram is None else diagonal_blocks(gram, spec.group)
    best_error: torch.Tensor | None = None
    for factor in factors(spec):
        grid = plain_grid(weight, spec, factor)
        error = block_error(round_to(weight, grid, spec) - weight, blocks, spec.group)
        if best_error is None:
            best_error, scale, zero = error, grid.scale, grid.zero
            chosen = torch.ones_like(error)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
        chosen = torch.where(better, torch.full_like(chosen, factor), chosen)
    return Clipped(Grid(scale, zero), float((chosen < 1).float().mean()))
