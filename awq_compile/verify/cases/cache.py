"""Cases of the kernels that move things in and out of the paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from awq_compile.models.config import ModelConfig
from awq_compile.verify.case import Case, Expected, ints, poisoned, shape_of
from awq_compile.verify.launch_table import Table
from awq_compile.verify.oracles.attention import Rope, Values, merge
from awq_compile.verify.tolerance import FUNCTION

Array = npt.NDArray[Any]
_PAGE = 16  # where a kernel takes any


def exactly(array: Array) -> Expected:
    """Bit for bit, for values that are only moved."""
    return Expected(array.astype(np.float64))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.standard_normal(shape).astype(dtype)


def _dtype(table: Table, name: str) -> str:
    return next(str(p["dtype"]) for p in table["params"] if p["name"] == name)


def append(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """New keys and values to their slots; position -1 is skipped."""
    _, _, heads, page, dim = shape_of(table, "pages")
    dtype = _dtype(table, "pages")
    for n in (1, 7, 64, 129):
        pages = _random(rng, (n // page + 4, 2, heads, page, dim), dtype)
        k, v = _random(rng, (n, heads, dim), dtype), _random(rng, (n, heads, dim), dtype)
        positions = rng.permutation(len(pages) * page)[:n]
        positions[1::5] = -1
        after = pages.copy()
        for i, p in enumerate(positions):
            if p >= 0:
                after[p // page, 0, :, p % page], after[p // page, 1, :, p % page] = k[i], v[i]
        yield Case(f"tokens={n}", [pages, k, v, ints(positions)], {0: exactly(after)})


def append_mla(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """The same for one latent vector per token, without skipping: TVM's scheduling rule loses that condition here.

    No model of ours calls this kernel; it is in every library because TVM's cache is created with it.
    """
    _, page, dim = shape_of(table, "pages")
    dtype = _dtype(table, "pages")
    for n in (1, 7, 129):
        pages, data = _random(rng, (n // page + 4, page, dim), dtype), _random(rng, (n, dim), dtype)
        positions = rng.permutation(len(pages) * page)[:n]
        after = pages.copy()
        after[positions // page, positions % page] = data
        yield Case(f"tokens={n}", [pages, data, ints(positions)], {0: exactly(after)})


def copy_single_page(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """The first tokens of a page to another."""
    _, _, heads, page, dim = shape_of(table, "pages")
    for source, target, length in ((3, 1, 1), (0, 4, 7), (2, 3, page)):
        pages = _random(rng, (5, 2, heads, page, dim), _dtype(table, "pages"))
        after = pages.copy()
        after[target, :, :, :length] = pages[source, :, :, :length]
        yield Case(f"tokens={length}", [pages, source, target, length], {0: exactly(after)})


def compact(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Tokens moved to lower slots, sequence by sequence and in order."""
    _, _, heads, page, dim = shape_of(table, "pages")
    for lengths in ((1,), (5, 0, 9)):
        pages = _random(rng, (6, 2, heads, page, dim), _dtype(table, "pages"))
        moves: list[tuple[int, int]] = []
        for i, n in enumerate(lengths):
            slots = np.sort(rng.permutation(2 * page)[: n + 1]) + 2 * page * i
            moves += [(int(slots[j + 1]), int(slots[j])) for j in range(n)]
        after = pages.copy()
        for source, target in moves:
            after[target // page, :, :, target % page] = after[source // page, :, :, source % page]
        indptr = ints(np.cumsum([0, *lengths]))
        table_of_moves = ints(np.array(moves).T)
        yield Case(f"moves={lengths}", [pages, indptr, table_of_moves, len(lengths)], {0: exactly(after)})


def debug_get_kv(table: Table, rng: np.random.Generator) -> Iterator[Case]:
    """Keys and values of positions, into one layer of the result."""
    _, _, heads, _, dim = shape_of(table, "pages")
    layers = shape_of(table, "k_data")[0]
    dtype = _dtype(table, "pages")
    for n in (1, 37):
        pages = _random(rng, (n // _PAGE + 3, 2, heads, _PAGE, dim), dtype)
        positions = rng.permutation(len(pages) * _PAGE)[:n]
        layer = int(rng.integers(0, layers))
        k, v = _random(rng, (layers, n, heads, dim), dtype), _random(rng, (layers, n, heads, dim), dtype)
        k[layer], v[layer] = poisoned(k[layer].shape, dtype), poisoned(v[layer].shape, dtype)
        after = [k.copy(), v.copy()]
        for which, array in enumerate(after):
            array[layer] = pages[positions // _PAGE, which, :, positions % _PAGE]
        expected = {2: exactly(after[0]), 3: exactly(after[1])}
        yield Case(f"tokens={n}", [pages, ints(positions), k, v, layer], expected)


def merge_state(table: Table, rng: np.random.Generator, config: ModelConfig) -> Iterator[Case]:
    """Two partial attentions into one, also where one of them saw nothing."""
    dtype = _dtype(table, "V")
    for n in (1, 7, 65):
        shape = (n, config.num_heads, config.head_dim)
        v, other = _random(rng, shape, dtype), _random(rng, shape, dtype)
        s, s_other = (rng.uniform(-8, 8, shape[:2]).astype(np.float32) for _ in range(2))
        s_other[::3, 0] = -5e4
        s[1::3, -1] = -5e4
        output, lse = merge(Values.of(v), s.astype(np.float64), Values.of(other), s_other.astype(np.float64), dtype)
        expected = {0: Expected(output.exact, output.error), 1: Expected(lse.exact, lse.error)}
        yield Case(f"rows={n}", [v, s, other, s_other], expected)


def split_rotary(table: Table, rng: np.random.Generator, config: ModelConfig) -> Iterator[Case]:
    """qkv apart, q and k rotated or as they were."""
    heads, kv_heads, dim = shape_of(table, "q")[1], shape_of(table, "k")[1], config.head_dim
    dtype = _dtype(table, "qkv")
    rope = Rope(config.rope_theta, 1.0, config.rope_scaling)
    for n, apply in ((1, 1), (7, 0), (65, 1), (128, 1)):
        qkv = _random(rng, (n, heads + 2 * kv_heads, dim), dtype)
        positions = rng.integers(0, config.context_window_size, n)
        q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
        rotated = [rope(x, positions, dtype) if apply else Values.of(x) for x in (q, k)]
        outputs = [poisoned(x.shape, dtype) for x in (q, k, v)]
        expected = {2 + i: Expected(x.exact, x.error + 2 * apply * FUNCTION) for i, x in enumerate(rotated)}
        yield Case(f"tokens={n} rotary={apply}", [qkv, ints(positions), *outputs, apply], {**expected, 4: exactly(v)})
