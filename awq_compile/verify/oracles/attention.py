"""Attention, rotary embedding and the paged KV cache in float64 NumPy, with bounds.

Scores are kept in log2: s = log2(e) scale q·k, lse = log2 Σ 2^s. Where nothing is visible, the output is 0 and lse
is -5e4 and a little more: TVM's kernels start every partial sum from (m, d) = (-5e4, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from awq_compile.models.config import Llama3Rope
from awq_compile.verify.tolerance import FUNCTION, ROUNDOFF, stored, summed

F64 = npt.NDArray[np.float64]
_LOG2E = float(np.log2(np.e))
NOTHING_VISIBLE = -5e4


@dataclass(frozen=True)
class Values:
    """Numbers and how far the device's own may be from them."""

    exact: F64
    error: F64

    @staticmethod
    def of(array: npt.NDArray[np.floating]) -> Values:
        """Inputs, which the device has exactly."""
        return Values(array.astype(np.float64), np.zeros(array.shape))


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: pair (x[i], x[i + D/2]) turns by position * scale * f_i, f_i = theta^(-2i/D), scaled."""

    theta: float
    scale: float
    scaling: Llama3Rope | None

    def frequencies(self, dim: int) -> F64:
        """(D/2,). llama3's scaling is written out at `models.kv_cache.rope_frequencies`."""
        plain = np.power(self.theta, -np.arange(0, dim, 2) / dim)
        if (s := self.scaling) is None:
            return np.asarray(plain)
        turns = s.original_max_position_embeddings * plain / (2 * np.pi)
        t = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        return np.asarray((1 - t) * plain / s.factor + t * plain)

    def __call__(self, x: npt.NDArray[np.floating], positions: npt.NDArray[np.integer], dtype: str) -> Values:
        """x (n, H, D) at positions (n,), rounded to `dtype`."""
        wide, half = x.astype(np.float64), x.shape[-1] // 2
        angle = (positions[:, None] * self.scale * self.frequencies(x.shape[-1]))[:, None]
        angle = np.concatenate([angle, angle], axis=-1)
        turned = np.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
        exact = np.cos(angle) * wide + np.sin(angle) * turned
        slack = FUNCTION * (np.abs(angle) + 1) * (np.abs(wide) + np.abs(turned))
        return Values(exact, slack + stored(np.abs(exact) + slack, dtype))


def attend(
    q: Values, k: Values, v: npt.NDArray[np.floating], visible: npt.NDArray[np.bool_], scale: float, dtype: str
) -> tuple[Values, Values]:
    """q (n, Hq, D), k and v (m, Hkv, D), visible (n, m) → output (n, Hq, D) in `dtype`, lse (n, Hq)."""
    n, heads, dim = q.exact.shape
    if not len(k.exact):
        zero = np.zeros(q.exact.shape)
        return Values(zero, zero), Values(np.full((n, heads), NOTHING_VISIBLE), np.full((n, heads), 10.0))
    group = heads // k.exact.shape[1]
    key, key_error, value = (np.repeat(a, group, axis=1) for a in (k.exact, k.error, v.astype(np.float64)))
    factor = scale * _LOG2E
    scores = np.einsum("nhd,mhd->nhm", q.exact, key) * factor
    magnitude = np.einsum("nhd,mhd->nhm", np.abs(q.exact), np.abs(key)) * factor
    error = summed(dim, magnitude)
    if q.error.any() or key_error.any():
        error = error + factor * (
            np.einsum("nhd,mhd->nhm", q.error, np.abs(key) + key_error)
            + np.einsum("nhd,mhd->nhm", np.abs(q.exact), key_error)
        )
    scores = np.where(visible[:, None], scores, -np.inf)
    seen = np.asarray(visible.any(axis=1, keepdims=True))  # (n, 1)
    top = np.where(seen[..., None], scores.max(axis=-1, keepdims=True), 0)
    weights = np.exp2(scores - top)
    total = np.where(seen[..., None], weights.sum(axis=-1, keepdims=True), 1)
    # Weight 2^(s - m): the errors of s and m, and of exp2 itself; then a sum of m terms on each side of the division.
    of_weight = np.log(2) * (error + np.max(np.where(visible[:, None], error, 0), axis=-1, keepdims=True))
    of_weight = np.expm1(of_weight) + FUNCTION + (len(key) + 8) * ROUNDOFF["float32"]
    relative = np.einsum("nhm,nhm->nh", weights / total, of_weight)[..., None]
    output = np.einsum("nhm,mhd->nhd", weights / total, value)
    spread = np.einsum("nhm,mhd->nhd", weights / total * of_weight, np.abs(value))
    bound = 1.1 * (spread + relative * np.einsum("nhm,mhd->nhd", weights / total, np.abs(value)))
    lse = (np.log2(total) + top)[..., 0]
    of_lse = 1.5 * relative[..., 0] + np.einsum("nhm,nhm->nh", weights / total, error) + FUNCTION
    of_lse = of_lse + 4 * ROUNDOFF["float32"] * (np.abs(lse) + np.abs(top[..., 0]))
    lse, of_lse = np.where(seen, lse, NOTHING_VISIBLE), np.where(seen, of_lse, 10.0)
    return Values(output, bound + stored(np.abs(output) + bound, dtype)), Values(lse, of_lse)


def causal_mask(n: int, m: int) -> npt.NDArray[np.bool_]:
    """(n, m): query i is the (m - n + i)-th of the m positions and sees those up to itself."""
    return np.asarray(np.arange(m)[None] <= np.arange(n)[:, None] + m - n)


def window_mask(n: int, m: int, window: int) -> npt.NDArray[np.bool_]:
    """(n, m) cached positions that are within `window` of query i, which comes i places behind them."""
    return np.asarray(np.arange(m)[None] >= m - np.maximum(window - np.arange(n)[:, None] - 1, 0))


def tree_mask(n: int, m: int, order: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """(n, m): the last len(order) positions are a tree; `order` has first and last + 1 of each subtree, depth first.

    A query sees all positions before the tree, itself and its ancestors. The n queries are the tree's last nodes.
    """
    size = len(order)
    first, last = order[:, 0], order[:, 1]
    inside = (first[:, None] >= first[None]) & (first[:, None] < last[None])  # (node, ancestor)
    return np.concatenate([np.ones((n, m - size), bool), inside[size - n :]], axis=1)


def merge(a: Values, a_lse: F64, b: Values, b_lse: F64, dtype: str) -> tuple[Values, Values]:
    """Two partial attentions as one: outputs weighted by 2^lse."""
    top = np.maximum(a_lse, b_lse)
    one, two = np.exp2(a_lse - top), np.exp2(b_lse - top)
    total = one + two
    output = a.exact * (one / total)[..., None] + b.exact * (two / total)[..., None]
    slack = 4 * FUNCTION * (np.abs(a.exact) * (one / total)[..., None] + np.abs(b.exact) * (two / total)[..., None])
    # exp2 of a difference of float32 numbers: the difference is off by its rounding.
    slack = slack * (1 + np.abs(a_lse - b_lse))[..., None]
    lse = np.log2(total) + top
    of_lse = 2 * FUNCTION + 4 * ROUNDOFF["float32"] * (np.abs(lse) + np.abs(top))
    return Values(output, slack + stored(np.abs(output) + slack, dtype)), Values(lse, of_lse)
