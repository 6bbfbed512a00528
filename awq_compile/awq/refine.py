"""Error-compensated rounding: codes chosen together, so that their errors cancel in the output.

Minimises tr((W - Ŵ) H (W - Ŵ)ᵀ), Ŵ = (q - z)·s, over codes q and scales s of fixed format, H = Σ x xᵀ (damped):

1. GPTQ (Frantar et al., arXiv 2210.17323): columns in order; each column's rounding error is spread over the
   columns after it by the upper Cholesky factor U of H^-1:  W_j -= (W_i - Ŵ_i) U_ij / U_ii  for j > i.
2. Sweeps of coordinate descent. With the gradient R = (W - Ŵ) H, a group's scale moves by
   (c·R_g) / (c H_g cᵀ), c = q - z, and a code to the grid point nearest Ŵ_k + R_k / H_kk.
   Both steps lower the objective or leave it. Scales move in the first sweep only: later ones gain little.

Matrices are held transposed, (K, N): a column of W is a contiguous row. Loops run over columns in Python and
over rows in torch. N rows are independent, so linears that share an input are refined stacked.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from awq_compile.awq.rounding import Grid, decode, encode, storable
from awq_compile.formats import QuantSpec

DAMPING: Final = 0.01  # of the mean diagonal of H, added to it
_BLOCK: Final = 64  # columns updated eagerly; the rest once per block
SWEEPS: Final = 2


class Refined(NamedTuple):
    """Codes (N, K) and grid after refinement."""

    codes: torch.Tensor
    grid: Grid


def damped(gram: torch.Tensor, amount: float = DAMPING) -> torch.Tensor:
    """H + λ·mean(diag H)·I; a channel that never fires gets λ alone."""
    mean = float(gram.diagonal().mean())
    return gram + torch.eye(gram.shape[0]) * (amount * mean if mean > 0 else 1.0)


def inverse_cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """Upper U with H^-1 = Uᵀ U."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def compensated(weight: torch.Tensor, grid: Grid, upper: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """GPTQ's codes (N, K) on a fixed grid; `upper` is the Cholesky factor of H^-1."""
    wt = weight.T.contiguous()  # (K, N), overwritten by what is still to be rounded
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    codes = torch.empty_like(wt)
    k = wt.shape[0]
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = torch.empty(stop - start, wt.shape[1])
        for i in range(start, stop):
            s, z = scale[i // spec.group], zero[i // spec.group]
            q = torch.div(wt[i], s).round_().add_(z).clamp_(0, spec.levels - 1)
            codes[i] = q
            error = wt[i].addcmul(q - z, s, value=-1).div_(upper[i, i])
            errors[i - start] = error
            if i + 1 < stop:
                wt[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        if stop < k:
            wt[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T


def _refit_scales(
    residual: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, group: int
) -> None:
    """One pass over the groups' scales (K/G, N); updates `residual` = R (K, N) and `scale` in place."""
    for g in range(scale.shape[0]):
        part = slice(g * group, (g + 1) * group)
        c = centred[part]
        wanted = (c * residual[part]).sum(0) / (c * (hessian[part, part] @ c)).sum(0).clamp(min=1e-20)
        new = storable(scale[g] + wanted)
        move = torch.where((new - scale[g] - wanted).abs() < wanted.abs(), new - scale[g], 0.0)
        scale[g] += move
        residual.addmm_(hessian[part].T, c * move, alpha=-1)


def _sweep_codes(
    residual: torch.Tensor,
    centred: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hessian: torch.Tensor,
    spec: QuantSpec,
) -> None:
    """One pass over all codes; `centred` = q - z (K, N) and `residual` = R are updated in place."""
    k, n = centred.shape
    inverse = 1.0 / scale  # (K/G, N)
    diagonal = (1.0 / hessian.diagonal()).tolist()
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        moves = torch.empty(stop - start, n)
        local = hessian[start:stop, start:stop].contiguous()
        part = residual[start:stop].clone()
        for i in range(start, stop):
            g, j = i // spec.group, i - start
            low = -zero[g]
            new = torch.addcmul(centred[i], part[j], inverse[g], value=diagonal[i]).round_()
            new = torch.minimum(torch.maximum(new, low), low + (spec.levels - 1))
            move = (new - centred[i]) * scale[g]
            centred[i] = new
            moves[j] = move
            part.addr_(local[j], move, alpha=-1)
        residual.addmm_(hessian[start:stop].T, moves, alpha=-1)


def refine(
    weight: torch.Tensor,
    grid: Grid,
    gram: torch.Tensor,
    spec: QuantSpec,
    *,
    sweeps: int = SWEEPS,
    upper: torch.Tensor | None = None,
) -> Refined:
    """Codes and scales for `weight` (N, K) started from `grid`; the caller compares with what it had.

    `upper` is `inverse_cholesky(damped(gram))` where the caller has it already.
    """
    hessian = damped(gram)
    codes = compensated(weight, grid, inverse_cholesky(hessian) if upper is None else upper, spec)
    if not sweeps:
        return Refined(codes, grid)
    zero, scale = grid.zero.T.contiguous(), grid.scale.T.contiguous()
    centred = codes.T - zero.repeat_interleave(spec.group, 0)
    residual = hessian @ (weight - decode(codes, grid, spec)).T
    for sweep in range(sweeps):
        if not sweep:
            _refit_scales(residual, centred, scale, hessian, spec.group)
        _sweep_codes(residual, centred, scale, zero, hessian, spec)
    found = Grid(scale.T.contiguous(), grid.zero)
    return Refined((centred + zero.repeat_interleave(spec.group, 0)).T.contiguous(), found)


def plain(weight: torch.Tensor, grid: Grid, spec: QuantSpec) -> Refined:
    """Nearest codes on the grid, in the same form."""
    return Refined(encode(weight, grid, spec), grid)
