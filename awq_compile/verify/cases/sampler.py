"""Cases of the sampler's kernels; signatures in `models.gpu_sampling`.

Probabilities are such that float32 sums are exact, so what is sorted and drawn is compared for equality.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.verify.case import Case, Expected, ints, poisoned, shape_of
from awq_compile.verify.launch_table import Table
from awq_compile.verify.oracles import sampler as oracle
from awq_compile.verify.tolerance import FUNCTION, stored

F32 = npt.NDArray[np.float32]
_SIZES: Final = ((1, 1), (3, 60))  # rows, samples: one of a few would miss most of the threads
_BELOW_ONE: Final = 1 - 2.0**-24  # the largest float32 below 1
_MARGIN: Final = 1e-6  # of a decision that float32 must take as float64 does


def argsort(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Ties, zeros and denormals."""
    for b in (1, 3):
        probs = oracle.exact_probabilities(rng, b, int(shape_of(table, "values")[1]))
        probs[0, :: max(probs.shape[1] // 5, 2)] = 1e-41
        values, columns = oracle.sort_descending(probs)
        arguments = [probs, poisoned(probs.shape, "float32"), poisoned(probs.shape, "int32")]
        expected = {1: Expected(values.astype(np.float64)), 2: Expected(columns.astype(np.float64))}
        yield Case(f"b={b}", arguments, expected)


def draw(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Rows come several times; goals lie on a cumulative sum, between two, and at both ends."""
    for b, k in _SIZES:
        probs = _rows(rng, b, int(shape_of(table, "probs")[1]))
        rows = rng.integers(0, b, k)
        uniform = _uniform(rng, probs[rows].astype(np.float64))
        drawn = [oracle.draw(probs[r].astype(np.float64), float(u)) for r, u in zip(rows, uniform, strict=True)]
        arguments = [probs, uniform, ints(rows), poisoned((k,), "int32")]
        yield Case(f"b={b} k={k}", arguments, {3: Expected(np.array(drawn, np.float64))})


def draw_top_p(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """With cuts on a cumulative sum, between two, after the first element and after the last."""
    vocab = int(shape_of(table, "probs")[1])
    for b, k in _SIZES:
        values, columns = oracle.sort_descending(_rows(rng, b, vocab))
        wide, rows = values.astype(np.float64), rng.integers(0, b, k)
        top_p = np.array([0.9, 1.0, 1e-5], np.float32)[:b]
        if b > 1:
            top_p[0] = np.cumsum(wide[0])[min(vocab - 1, 5)]
        last = [oracle.last_of_top_p(row, float(p)) for row, p in zip(wide, top_p, strict=True)]
        kept = np.stack([np.where(np.arange(vocab) <= last[r], wide[r], 0.0) for r in rows])
        uniform = _uniform(rng, kept, between=True)
        places = [oracle.draw(row, float(u)) for row, u in zip(kept, uniform, strict=True)]
        arguments = [values, ints(columns), uniform, ints(rows), top_p, poisoned((k,), "int32")]
        yield Case(f"b={b} k={k}", arguments, {5: Expected(columns[rows, places].astype(np.float64))})


def take_probs(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Of drawn tokens, and of the most probable: of none, of fewer than are drawn, of more."""
    vocab = int(shape_of(table, "unsorted_probs")[1])
    for b, k, p in ((1, 1, 0), (3, 300, 2), (3, 2, 600)):
        probs = oracle.exact_probabilities(rng, b, vocab)
        _, columns = oracle.sort_descending(probs)
        rows, tokens = rng.integers(0, b, k), rng.integers(0, vocab, k)
        offsets = rng.integers(0, b * vocab, p)
        at = offsets // vocab
        top = columns[at, offsets % vocab]
        results = [(probs[rows, tokens], "float32"), (probs[at, top], "float32"), (top, "int32")]
        arguments = [probs, ints(columns), ints(rows), ints(tokens), ints(offsets)]
        outputs = [poisoned(values.shape, dtype) for values, dtype in results]
        expected = {5 + i: Expected(values.astype(np.float64)) for i, (values, _) in enumerate(results)}
        yield Case(f"b={b} k={k} p={p}", [*arguments, *outputs], expected)


def renormalize(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Cuts within equal probabilities; of little, of everything."""
    vocab = int(shape_of(table, "probs")[1])
    for cuts in ([0.5], [0.9, 1e-5, 1.0, 0.99]):
        probs, top_p = _rows(rng, len(cuts), vocab), np.array(cuts, np.float32)
        wide = probs.astype(np.float64)
        after = np.stack([oracle.renormalize_top_p(row, float(p)) for row, p in zip(wide, top_p, strict=True)])
        bound = FUNCTION * after + stored(after, "float32") * (after > 0)
        yield Case(f"b={len(cuts)}", [probs, top_p, poisoned(probs.shape, "float32")], {2: Expected(after, bound)})


# Parents of the nodes of a tree, as MLC numbers them: siblings side by side.
_TREES: Final = ((-1, 0), (-1, 0, 1, 2, 3), (-1, 0, 0, 0, 1, 1, 3, 3, 7))


def verify_drafts(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Chains and trees, with every outcome; drafts whose rest is nothing are accepted."""
    vocab = int(shape_of(table, "draft_probs")[1])
    for trees in ((_TREES[0],), _TREES[1:], (*_TREES[2:], *_TREES, *_TREES[1:])):
        while True:
            arguments = _drafts(rng, trees, vocab)
            q, tokens, p, first, following, uniform, roots = arguments
            wide = [a.astype(np.float64) for a in (q, p, uniform)]
            verified = oracle.verify_drafts(wide[0], tokens, wide[1], first, following, wide[2], roots)
            if verified.margin > _MARGIN / vocab:
                break
        expected = {2: Expected(verified.probs, verified.bound), 6: Expected(verified.parents.astype(np.float64))}
        yield Case(f"{len(trees)} trees of {len(tokens)} nodes", arguments, expected)


def _drafts(rng: np.random.Generator, trees: tuple[tuple[int, ...], ...], vocab: int) -> list[npt.NDArray[Any]]:
    """The arguments of a verification. A node's draft is like what follows its parent, so that some are accepted."""
    parents = np.concatenate([[p if p < 0 else p + sum(map(len, trees[:i])) for p in t] for i, t in enumerate(trees)])
    m = len(parents)
    p = oracle.exact_probabilities(rng, m, vocab)
    q = (oracle.exact_probabilities(rng, m, vocab) + p[parents]) / np.float32(2)
    q[rng.random(m) < 0.2] *= np.float32(4)  # above p everywhere: nothing is left of p
    tokens = np.array([rng.choice(vocab, p=row.astype(np.float64) / row.sum(dtype=np.float64)) for row in q])
    first, following = np.full(m, -1), np.full(m, -1)
    for node in reversed(range(m)):
        if parents[node] >= 0:
            following[node], first[parents[node]] = first[parents[node]], node
    roots = np.flatnonzero(parents < 0)
    uniform = rng.random(m, np.float32)
    return [q, ints(tokens), p, ints(first), ints(following), uniform, ints(roots)]


def _rows(rng: np.random.Generator, b: int, vocab: int) -> F32:
    """The last of several has all of its probability in one element, which is not the last."""
    probs = oracle.exact_probabilities(rng, b, vocab)
    if b > 1:
        probs[-1] = np.arange(vocab) == vocab * 2 // 3
    return probs


def _uniform(rng: np.random.Generator, rows: npt.NDArray[np.float64], *, between: bool = False) -> F32:
    """For each row (k, V): 0, just below 1, 1, then goals on a cumulative sum or in the middle between two."""
    found = [0.0, _BELOW_ONE, 1.0][: len(rows)]
    for row in rows[len(found) :]:
        cumulative = np.cumsum(row)
        j = int(rng.choice(np.flatnonzero(row)))
        middle = between or rng.random() < 0.5
        found.append((cumulative[j] - row[j] * (0.5 if middle else 1.0)) / cumulative[-1])
    return np.array(found, np.float32)
