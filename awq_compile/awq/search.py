"""AWQ's search for input-channel scales (Lin et al., arXiv 2306.00978, eq. 4), by Gram matrix.

For linears W (N, K) that read the same x, with H = Σ x xᵀ over the calibration tokens, find s > 0 that minimises

    L(s) = Σ_x ||Q(W diag(s)) diag(s)^-1 x - W x||² = tr(ΔW H ΔWᵀ),   ΔW = Q(W diag(s)) diag(s)^-1 - W

over s = a^r ("mean") and s = a^r / w^(1-r) ("duo"), a_k = E|x_k|, w_k the mean over rows of |W_nk| over its
group's absmax, r = 0, 1/19, …, 1; the identity is "mean" with r = 0. Each s is divided by sqrt(max·min) and
kept above 1e-4. Departures from the paper: the loss comes from H, not from replaying tokens, so its cost does
not depend on their number; large matrices are ranked on evenly spaced rows, and the winner checked on more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from awq_compile.awq.rounding import as_groups, plain_grid, round_to
from awq_compile.formats import QuantSpec

STEPS: Final = 20
SMALLEST: Final = 1e-4
_RANK_MACS: Final = 1 << 29  # multiply-adds spent on one candidate
CHECK_MACS: Final = 1 << 33  # and on one loss that decides or is reported
_FEWEST_ROWS: Final = 64  # but never fewer rows than these


@dataclass(frozen=True)
class Choice:
    """The winner: its scales (K,), and its loss and round-to-nearest's over the rows that were checked."""

    kind: str
    ratio: float
    scale: torch.Tensor
    loss: float
    rtn_loss: float


def quadratic(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(Δ H Δᵀ)."""
    return float(((delta @ gram) * delta).sum(dtype=torch.float64))


def some_rows(n: int, k: int, macs: int) -> torch.Tensor:
    """Evenly spaced indices of as many of n rows as a quadratic with (K, K) may use; all of them unless K is large."""
    rows = min(n, max(_FEWEST_ROWS, macs // (k * k)))
    return torch.linspace(0, n - 1, rows).round().long()


def share(value: torch.Tensor, heads: tuple[int, int] | None) -> torch.Tensor:
    """Mean of a (K,) vector over the query heads that read one KV head, for every channel of it.

    `heads` is (query heads, KV heads) for the input of o_proj, whose channel `h*D + d` comes from channel
    `(h // (heads / kv_heads))*D + d` of v_proj; None for other inputs.
    """
    if heads is None or heads[0] == heads[1]:
        return value
    query, kv = heads
    channels = value.reshape(kv, query // kv, -1)
    return channels.mean(1, keepdim=True).expand_as(channels).reshape(-1)


def normalised(scale: torch.Tensor) -> torch.Tensor:
    """Clamped at 1e-4 and divided by sqrt(max·min)."""
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def candidates(mean_abs: torch.Tensor, weight: torch.Tensor, group: int) -> Iterator[tuple[str, float, torch.Tensor]]:
    """(kind, r, s) of every candidate, the identity first; `mean_abs` (K,), `weight` (N, K)."""
    yield "identity", 0.0, torch.ones_like(mean_abs)
    a = mean_abs.clamp(min=SMALLEST * float(mean_abs.max().clamp(min=1e-30)))
    size = as_groups(weight.abs(), group)
    w = (size / size.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(-2).mean(0).clamp(min=SMALLEST)
    for step in range(STEPS):
        r = step / (STEPS - 1)
        if step:
            yield "mean", r, normalised(a**r)
        if step < STEPS - 1:  # at r = 1 both kinds agree
            yield "duo", r, normalised(a**r / w ** (1 - r))


def scaled_delta(weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """ΔW = Q(W diag(s)) diag(s)^-1 - W, plain rounding."""
    scaled = weight * scale
    return round_to(scaled, plain_grid(scaled, spec), spec).div_(scale).sub_(weight)


def search_scale(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mean_abs: torch.Tensor,
    spec: QuantSpec,
    heads: tuple[int, int] | None = None,
) -> Choice:
    """Best scales for the stacked rows `weight` (N, K) of all linears that share them; never worse than identity."""
    n, k = weight.shape
    ranked, checked = weight[some_rows(n, k, _RANK_MACS)], weight[some_rows(n, k, CHECK_MACS)]
    best: tuple[float, str, float, torch.Tensor] | None = None
    for kind, ratio, scale in candidates(mean_abs, weight, spec.group):
        scale = normalised(share(scale.log(), heads).exp()) if kind != "identity" else scale
        loss = quadratic(scaled_delta(ranked, scale, spec), gram)
        if best is None or loss < best[0]:
            best = loss, kind, ratio, scale
    assert best is not None
    _, kind, ratio, scale = best
    identity = torch.ones_like(mean_abs)
    rtn_loss = quadratic(scaled_delta(checked, identity, spec), gram)
    loss = rtn_loss if kind == "identity" else quadratic(scaled_delta(checked, scale, spec), gram)
    if not loss < rtn_loss:
        return Choice("identity", 0.0, identity, rtn_loss, rtn_loss)
    return Choice(kind, ratio, scale, loss, rtn_loss)
