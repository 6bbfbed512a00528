"""Cases of what the MLC runtime calls on logits and rows; signatures in `models.sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from awq_compile.verify.case import Case, Expected, ints, poisoned
from awq_compile.verify.launch_table import Table
from awq_compile.verify.tolerance import FUNCTION, PRINTED, ROUNDOFF, stored, summed

_LOWEST = float(np.finfo(np.float32).min)
_SINGLE = ROUNDOFF["float32"]


def _width(table: Table, name: str = "logits") -> int:
    return next(int(p["shape"][-1]) for p in table["params"] if p["name"] == name)


def _pairs(rng: np.random.Generator, rows: int, vocab: int, count: int) -> tuple[Any, Any]:
    """`count` different (row, token); the runtime gives no pair twice."""
    chosen = rng.permutation(rows * vocab)[:count]
    return chosen // vocab, chosen % vocab


def logit_bias(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """A bias on some tokens of some rows."""
    vocab = _width(table)
    for b, t in ((1, 1), (3, 7), (8, 300)):
        logits = rng.standard_normal((b, vocab)).astype(np.float32)
        rows, tokens = _pairs(rng, b, vocab, t)
        bias = rng.standard_normal(t).astype(np.float32)
        after, bound = logits.astype(np.float64), np.zeros((b, vocab))
        after[rows, tokens] += bias
        bound[rows, tokens] = 1.01 * _SINGLE * np.abs(after[rows, tokens])
        yield Case(f"b={b} tokens={t}", [logits, ints(rows), ints(tokens), bias], {0: Expected(after, bound)})


def penalty(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Presence, frequency and repetition, on some of the rows."""
    vocab = _width(table)
    for b, q, t in ((1, 1, 1), (4, 3, 7), (8, 5, 300)):
        logits = (2 * rng.standard_normal((b, vocab))).astype(np.float32)
        seq_ids = rng.permutation(b)[:q]
        rows, tokens = _pairs(rng, q, vocab, t)
        counts = rng.integers(1, 9, t)
        penalties = rng.uniform(0.1, 2.0, (q, 3)).astype(np.float32)
        after, bound = logits.astype(np.float64), np.zeros((b, vocab))
        presence, frequency, repetition = penalties.astype(np.float64)[rows].T
        at = (seq_ids[rows], tokens)
        before = after[at]
        lower = before - (presence + counts * frequency)
        after[at] = np.where(lower < 0, lower * repetition, lower / repetition)
        error = 4 * _SINGLE * (np.abs(before) + presence + counts * frequency)
        bound[at] = error * np.maximum(repetition, 1 / repetition) + FUNCTION * np.abs(after[at])
        arguments = [logits, ints(seq_ids), ints(rows), ints(tokens), ints(counts), penalties]
        yield Case(f"b={b} rows={q} tokens={t}", arguments, {0: Expected(after, bound)})


def bitmask(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Tokens whose bit is clear are ruled out, in some of the rows."""
    vocab, words = _width(table), _width(table, "bitmask")
    for b, q in ((1, 1), (5, 3)):
        logits = rng.standard_normal((b, vocab)).astype(np.float32)
        seq_ids = rng.permutation(b)[:q]
        mask = rng.integers(-(1 << 31), 1 << 31, (b, words)).astype(np.int32)
        bits = (mask.view(np.uint32)[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
        allowed = bits.reshape(b, -1)[:, :vocab] != 0
        after = logits.astype(np.float64)
        after[seq_ids] = np.where(allowed[seq_ids], after[seq_ids], _LOWEST)
        bound = np.where(after == _LOWEST, PRINTED * -_LOWEST, 0.0)
        yield Case(f"b={b} rows={q}", [logits, ints(seq_ids), mask], {0: Expected(after, bound)})


def move_rows(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """`gather_*` and `scatter_*`, told apart by which of `src` and `dst` has as many rows as there are indices."""
    params = {p["name"]: p for p in table["params"]}
    scatter = params["src"]["shape"][0] == params["indices"]["shape"][0]
    width, dtype = params["src"]["shape"][1], params["src"]["dtype"]
    for m, b in ((1, 1), (9, 5), (12, 7)):
        indices = rng.permutation(m)[:b]
        src = rng.standard_normal((b if scatter else m, width)).astype(dtype)
        if scatter:
            before = rng.standard_normal((m, width)).astype(dtype)
            after = before.copy()
            after[indices] = src
        else:
            before, after = poisoned((b, width), dtype), src[indices]
        expected = {2: Expected(after.astype(np.float64))}
        yield Case(f"m={m} b={b}", [src, ints(indices), before], expected)


def softmax(table: Table, rng: np.random.Generator, rows: Sequence[int], active: int) -> Iterator[Case]:
    """Probabilities at several temperatures; 0 gives 1/count on the largest logits. Those behind `active` get 0."""
    vocab = int(table["params"][0]["shape"][-1])
    for b in rows:
        logits = (4 * rng.standard_normal((b, 1, vocab))).astype(np.float32)
        temperature = rng.uniform(0.3, 2.0, b).astype(np.float32)
        temperature[::3] = 0.0 if b > 1 else temperature[0]
        logits[:, :, [1, active - 1]] = logits.max(axis=-1)[..., None]  # a tie, on the last token too
        logits[:, :, active:] += 100.0
        wide, t = logits[:, 0, :active].astype(np.float64), temperature.astype(np.float64)[:, None]
        below = wide - wide.max(axis=-1, keepdims=True)
        exponent = below / np.where(t > 0, t, 1.0)
        weights = np.where(t > 0, np.exp(exponent), below >= 0)
        total = weights.sum(axis=-1, keepdims=True)
        expected = weights / total
        relative = FUNCTION + 4 * _SINGLE * np.abs(exponent) * (t > 0)
        mean = (weights * relative).sum(axis=-1, keepdims=True) / total
        bound = expected * (relative + mean) + summed(active, expected) + stored(expected, "float32")
        padded = [np.pad(x, ((0, 0), (0, vocab - active)))[:, None] for x in (expected, bound)]
        values = Expected(padded[0], padded[1])
        yield Case(f"b={b}", [logits, temperature, poisoned(logits.shape, "float32")], {2: values})
