"""Attention kernels against float64 NumPy: several sequences, part pages, odd heads, and memory that holds NaN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tvm
from helpers_build import cpu_target

from awq_compile.kernels import cpu_attention
from awq_compile.kernels.attention import AttentionShape

SCALE = 0.125
SHAPES = [
    AttentionShape(8, 1, 64, lanes=16),
    AttentionShape(14, 2, 24, lanes=8),  # 7 query heads per key head, head size 24
    AttentionShape(3, 3, 10, lanes=4),  # no grouping, and 5 pairs to rotate
    AttentionShape(4, 2, 80, lanes=16),
    AttentionShape(4, 2, 32, lanes=16, page=8),
    AttentionShape(4, 2, 32, lanes=8, page=64),
]


def build(function: Any) -> Any:
    return tvm.tirx.build(tvm.IRModule({"main": function}), target=cpu_target())[function.attrs["global_symbol"]]


def tensor(array: Any) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def ints(values: Sequence[int]) -> Any:
    """A view that does not begin at its buffer's start, as the cache passes them."""
    whole = tensor(np.array([-7, -7, *values], np.int32))
    return whole._create_view((len(values),), "int32", 8)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """q (n, Hq, D), k and v (m, Hkv, D) → output, and log2 of the sum of 2^score."""
    group, (n, m) = q.shape[1] // k.shape[1], (len(q), len(k))
    k, v = (np.repeat(x, group, axis=1).astype(np.float64) for x in (k, v))
    scores = np.einsum("nhd,mhd->nhm", q.astype(np.float64), k) * SCALE * np.log2(np.e)
    if causal:
        hidden = np.arange(m)[None] > np.arange(n)[:, None] + m - n
        scores = np.where(hidden[:, None], -np.inf, scores)
    weights = np.exp2(scores)
    total = weights.sum(axis=-1)
    return np.einsum("nhm,mhd->nhd", weights / total[..., None], v), np.log2(total)


def random(shape: AttentionShape, n: int, heads: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, heads, shape.head_dim)).astype(np.float32) * 2


class Pages:
    """Keys and values of sequences scattered over pages; what no sequence owns is NaN."""

    def __init__(self, shape: AttentionShape, lengths: Sequence[int]) -> None:
        self.k = [random(shape, n, shape.kv_heads, i) for i, n in enumerate(lengths)]
        self.v = [random(shape, n, shape.kv_heads, 50 + i) for i, n in enumerate(lengths)]
        page_size = shape.page
        counts = [-(-n // page_size) for n in lengths]
        order = np.random.default_rng(9).permutation(sum(counts) + 2)[: sum(counts)]
        memory = np.full((sum(counts) + 2, 2, shape.kv_heads, page_size, shape.head_dim), np.nan, np.float32)
        self.indptr = [0, *np.cumsum(counts).tolist()]
        for i, n in enumerate(lengths):
            for p in range(n):
                page = order[self.indptr[i] + p // page_size]
                memory[page, 0, :, p % page_size], memory[page, 1, :, p % page_size] = self.k[i][p], self.v[i][p]
        last = [(n - 1) % page_size + 1 if n else 0 for n in lengths]
        self.arguments = [tensor(memory), ints(self.indptr), ints(order.tolist()), ints(last)]


def outputs(shape: AttentionShape, n: int) -> tuple[Any, Any]:
    wrong = np.full((n, shape.heads, shape.head_dim), np.nan, np.float32)
    return tensor(wrong), tensor(wrong[:, :, 0])


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


ROPE = (0, 1.0, 1e4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_prefill(shape: AttentionShape) -> None:
    """Prompts of 1, 40 and 17 tokens in one call, each causal within itself."""
    lengths = (1, 40, 17)
    indptr = np.cumsum([0, *lengths]).tolist()
    n = indptr[-1]
    q, k, v = random(shape, n, shape.heads, 1), random(shape, n, shape.kv_heads, 2), random(shape, n, shape.kv_heads, 3)
    out, lse = outputs(shape, n)
    positions, starts = ints([0] * n), ints([0] * len(lengths))
    function = build(cpu_attention.ragged_prefill(shape))
    arguments = (tensor(q), ints(indptr), tensor(k), tensor(v), ints(indptr), positions, starts, out, lse)
    function(*arguments, 1, *ROPE, SCALE)
    for a, b in pairwise(indptr):
        expected, expected_lse = attention(q[a:b], k[a:b], v[a:b], causal=True)
        close(out.numpy()[a:b], expected)
        close(lse.numpy()[a:b], expected_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_prefill(shape: AttentionShape, causal: bool) -> None:
    """New tokens against 37, 0 and 16 positions in pages; a sequence without any gets weight zero."""
    lengths, new = (37, 0, 16), (5, 2, 3)
    pages = Pages(shape, lengths)
    indptr = np.cumsum([0, *new]).tolist()
    q = random(shape, indptr[-1], shape.heads, 4)
    out, lse = outputs(shape, indptr[-1])
    function = build(cpu_attention.paged_prefill(shape))
    positions, starts = ints([0] * indptr[-1]), ints([0] * 3)
    function(tensor(q), ints(indptr), *pages.arguments, starts, positions, out, lse, int(causal), *ROPE, SCALE)
    for i, (a, b) in enumerate(pairwise(indptr)):
        if lengths[i] == 0:
            assert (out.numpy()[a:b] == 0).all()
            assert (lse.numpy()[a:b] <= -1e4).all()
            continue
        expected, expected_lse = attention(q[a:b], pages.k[i], pages.v[i], causal=causal)
        close(out.numpy()[a:b], expected)
        close(lse.numpy()[a:b], expected_lse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_decode(shape: AttentionShape) -> None:
    """One token each against 1, 100, 0 and 48 positions."""
    lengths = (1, 100, 0, 48)
    pages = Pages(shape, lengths)
    q = random(shape, len(lengths), shape.heads, 5)
    out, lse = outputs(shape, len(lengths))
    zeros = ints([0] * len(lengths))
    build(cpu_attention.paged_decode(shape))(tensor(q), *pages.arguments, zeros, zeros, out, lse, *ROPE, SCALE)
    for i, length in enumerate(lengths):
        if length == 0:
            assert (out.numpy()[i] == 0).all()
            assert (lse.numpy()[i] <= -1e4).all()
            continue
        expected, expected_lse = attention(q[i : i + 1], pages.k[i], pages.v[i], causal=False)
        close(out.numpy()[i : i + 1], expected)
        close(lse.numpy()[i : i + 1], expected_lse)


def test_large_scores() -> None:
    """Scores of hundreds of powers of two apart neither overflow nor lose the largest."""
    shape = SHAPES[0]
    pages = Pages(shape, (50,))
    q = random(shape, 1, shape.heads, 6) * 200
    out, lse = outputs(shape, 1)
    zero = ints([0])
    build(cpu_attention.paged_decode(shape))(tensor(q), *pages.arguments, zero, zero, out, lse, *ROPE, SCALE)
    keys = np.repeat(pages.k[0], shape.group, 1)
    scores = np.einsum("hd,mhd->hm", q[0].astype(np.float64), keys) * SCALE
    best = scores.argmax(axis=1)
    clear = np.sort(scores, axis=1)[:, -1] - np.sort(scores, axis=1)[:, -2] > 20
    assert clear.any()
    close(out.numpy()[0][clear], pages.v[0][best, 0][clear])
    np.testing.assert_allclose(lse.numpy()[0][clear], scores.max(axis=1)[clear] * np.log2(np.e), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_state(shape: AttentionShape) -> None:
    """Attention over two halves, merged, is attention over both; an empty half changes nothing."""
    q, k, v = (
        random(shape, 6, shape.heads, 7),
        random(shape, 30, shape.kv_heads, 8),
        random(shape, 30, shape.kv_heads, 9),
    )
    one, two = attention(q, k[:11], v[:11], causal=False), attention(q, k[11:], v[11:], causal=False)
    first = [tensor(x.astype(np.float32)) for x in one]
    function = build(cpu_attention.merge_state(shape))
    function(*first, *(tensor(x.astype(np.float32)) for x in two))
    for got, expected in zip(first, attention(q, k, v, causal=False), strict=True):
        close(got.numpy(), expected)
    before = first[0].numpy()
    nothing = np.full((6, shape.heads), -5e4, np.float32)
    function(*first, tensor(np.zeros_like(before)), tensor(nothing))
    np.testing.assert_array_equal(first[0].numpy(), before)


@pytest.mark.parametrize("apply", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_rotary(shape: AttentionShape, apply: int) -> None:
    """q and k turned by position times frequency, v copied; with rotation off all are copied."""
    half, n = shape.head_dim // 2, 5
    frequencies = (1 / 100 ** (np.arange(half) / half)).astype(np.float32)
    positions = [0, 1, 77, 2000, 3]
    qkv = random(shape, n, shape.heads + 2 * shape.kv_heads, 10)
    outs = [tensor(np.full((n, h, shape.head_dim), np.nan, np.float32)) for h in (shape.heads, *[shape.kv_heads] * 2)]
    build(cpu_attention.split_rotary(shape, frequencies))(tensor(qkv), ints(positions), *outs, apply)
    angles = (np.array(positions, np.float32)[:, None] * frequencies).astype(np.float64)[:, None] * apply
    a, b = qkv[..., :half].astype(np.float64), qkv[..., half:].astype(np.float64)
    turned = np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)
    heads, kv_heads = shape.heads, shape.kv_heads
    close(outs[0].numpy(), turned[:, :heads])
    close(outs[1].numpy(), turned[:, heads : heads + kv_heads])
    np.testing.assert_array_equal(outs[2].numpy(), qkv[:, heads + kv_heads :])
