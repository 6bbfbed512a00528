"""What the sampler must compute, in NumPy and float64, and probabilities of which float32 sums are exact.

Definitions are those of `kernels.sampler`. (b, V) are probabilities in float64, each row for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from awq_compile.verify.tolerance import FUNCTION, ROUNDOFF

F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
_U = ROUNDOFF["float32"]
_SAME = 1e-7
_UNITS = 1 << 20


def exact_probabilities(rng: np.random.Generator, rows: int, vocab: int) -> npt.NDArray[np.float32]:
    """(rows, vocab) multiples of 2^-20 that sum to 1: with a long tail, many equal, some zero.

    Every sum of some of a row is exact in float32, whatever its order: what is found by it has one right answer.
    """
    weights = rng.exponential(size=(rows, vocab)) ** 3
    counts = [rng.multinomial(_UNITS, w / w.sum()) for w in weights]
    return (np.stack(counts) / _UNITS).astype(np.float32)


def sort_descending(probs: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(values, columns); of equal values the one further left comes first."""
    order = np.argsort(-probs.astype(np.float64), axis=1, kind="stable")
    return np.take_along_axis(probs, order, 1), order


def draw(probs: F64, uniform: float) -> int:
    """The first column whose cumulative sum is above `uniform` times the row's sum; at 1, the last that is not 0."""
    cumulative = np.cumsum(probs)
    above = np.flatnonzero(cumulative > uniform * cumulative[-1])
    return int(above[0] if above.size else np.flatnonzero(probs)[-1])


def last_of_top_p(sorted_probs: F64, top_p: float) -> int:
    """The first column up to which a sorted row sums to `top_p` of its sum."""
    cumulative = np.cumsum(sorted_probs)
    return int(np.flatnonzero(cumulative >= top_p * cumulative[-1])[0])


def renormalize_top_p(probs: F64, top_p: float) -> F64:
    """A row of the most probable that reach `top_p` of its sum, with all that are as probable as the last one."""
    values = np.sort(probs)[::-1]
    least = values[last_of_top_p(values, top_p)] if top_p < 1 else 0.0
    kept = np.where(probs >= least, probs, 0.0)
    return np.asarray(kept / kept.sum())


@dataclass(frozen=True)
class Verified:
    """`probs` and `parents` after the verification; what float32 may err in them; how near the nearest decision was."""

    probs: F64
    bound: F64
    parents: Ints
    margin: float


def verify_drafts(
    draft_probs: F64, tokens: Ints, model_probs: F64, first_child: Ints, next_sibling: Ints, uniform: F64, roots: Ints
) -> Verified:
    """Walks each tree as `kernels.sampler.verify_drafts` says."""
    p, bound, margin, reached = model_probs.copy(), np.zeros_like(model_probs), np.inf, []
    for root in roots:
        node, child = root, first_child[root]
        while child >= 0:
            x, q = tokens[child], draft_probs[child]
            difference = p[node, x] - uniform[child] * q[x]
            margin = min(margin, abs(difference) - bound[node, x] - 4 * _U * q[x])
            left = np.maximum(p[node] - q, 0.0)
            total = left.sum()
            if difference >= 0 or total < _SAME:
                node, child = child, first_child[child]
                continue
            margin = min(margin, abs(total / _SAME - 1))
            absolute = bound[node] + _U * np.maximum(p[node], q)
            relative = absolute.sum() / total + (len(q) + 8) * _U + FUNCTION
            p[node] = left / total
            bound[node] = absolute / total + relative * p[node]
            child = next_sibling[child]
        reached.append(node)
    return Verified(p, bound, np.array(reached, np.int32), margin)
