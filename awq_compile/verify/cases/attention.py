"""Cases of the attention kernels over a paged KV cache: several sequences of different lengths, scattered pages.

Pages are (num_pages, 2, Hkv, page, D): keys in [:, 0], values in [:, 1]. Memory that no sequence owns is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.models.config import Llama3Rope
from awq_compile.verify.case import Case, Expected, ints, poisoned, shape_of
from awq_compile.verify.launch_table import Table
from awq_compile.verify.oracles.attention import Rope, Values, attend, causal_mask, tree_mask, window_mask

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
_THETA: Final = 5000.0
_SCALE: Final = 0.75  # of positions; both are arguments, and unusual so that a kernel must read them
_WINDOW: Final = 1024  # TVM compiles it in


@dataclass(frozen=True)
class _Kernel:
    """Sizes and types of one attention kernel, and how its arguments are made."""

    table: Table
    rng: np.random.Generator
    scaling: Llama3Rope | None
    heads: int
    kv_heads: int
    dim: int
    dtype: str

    @staticmethod
    def of(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> _Kernel:
        params = {p["name"].lower(): p for p in table["params"]}
        _, heads, dim = params["q"]["shape"]
        kv_heads = params["pages"]["shape"][2] if "pages" in params else params["k"]["shape"][1]
        return _Kernel(table, rng, scaling, heads, kv_heads, dim, params["q"]["dtype"])

    def random(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(self.dtype)

    @property
    def softmax_scale(self) -> float:
        return float(np.float32(self.dim**-0.5))

    def attend(self, query: Values, key: Values, value: Array, visible: Mask) -> tuple[Values, Values]:
        return attend(query, key, value, visible, self.softmax_scale, self.dtype)

    def rope(self) -> Rope:
        return Rope(float(np.float32(_THETA)), _SCALE, self.scaling)

    def rotated(self, x: Array, positions: Array, rotary: bool) -> Values:
        return self.rope()(x, positions, self.dtype) if rotary else Values.of(x)

    def case(
        self, label: str, arguments: list[Any], at: int, parts: Sequence[tuple[Values, Values]], after: list[Any]
    ) -> Case:
        """`at` is the number of arguments before the two outputs."""
        rows = sum(len(part.exact) for part, _ in parts)
        outputs = [poisoned((rows, self.heads, self.dim), self.dtype), poisoned((rows, self.heads), "float32")]
        expected = {}
        for number in (0, 1):
            exact = np.concatenate([part[number].exact for part in parts])
            error = np.concatenate([part[number].error for part in parts])
            expected[at + number] = Expected(exact, error)
        return Case(label, [*arguments[:at], *outputs, *after], expected)

    def scalars(self, rotary: bool, causal: bool | None = None) -> list[Any]:
        first = [] if causal is None else [int(causal)]
        return [*first, int(rotary), _SCALE, _THETA, self.softmax_scale]


@dataclass(frozen=True)
class _Pages:
    """Keys and values of sequences of `lengths`, in pages; with a sliding window, parts of them are skipped.

    `windows` gives (sink, offset) of each sequence: positions from `sink` up to `offset` are no longer seen. `spare`
    more entries of the page table, of no sequence and no page, lie behind the others.
    """

    kernel: _Kernel
    lengths: Sequence[int]
    windows: Sequence[tuple[int, int]] | None = None
    spare: int = 0
    k: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)

    def arguments(self) -> list[Any]:
        """pages, indptr, values, length_info; fills `k` and `v` with what is seen."""
        kernel = self.kernel
        page: int = shape_of(kernel.table, "pages")[3]
        counts = [-(-n // page) for n in self.lengths]
        total = sum(counts)
        order = kernel.rng.permutation(total + 3)[:total]
        memory = np.full((total + 3, 2, kernel.kv_heads, page, kernel.dim), np.nan, kernel.dtype)
        indptr = np.cumsum([0, *counts])
        for i, n in enumerate(self.lengths):
            kept = np.ones(n, bool)
            if self.windows is not None:
                sink, offset = self.windows[i]
                kept[sink:offset] = False
            new = kernel.random(2, n, kernel.kv_heads, kernel.dim)
            new[:, ~kept] = np.nan  # evicted positions are not to be read either
            for p in range(n):
                memory[order[indptr[i] + p // page], :, :, p % page] = new[:, p]
            self.k.append(new[0][kept])
            self.v.append(new[1][kept])
        last = [(n - 1) % page + 1 if n else 0 for n in self.lengths]
        info: Any = last
        if self.windows is not None:
            info = [last, [offset for _, offset in self.windows], [sink for sink, _ in self.windows]]
        return [memory, ints(indptr), ints([*order, *[-1] * self.spare]), ints(info)]


def ragged_prefill(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """Prompts in one call; keys and values lie beside the queries."""
    kernel = _Kernel.of(table, rng, scaling)
    yield _ragged(kernel, (1,), (1,), causal=True)
    yield _ragged(kernel, (3, 17, 1, 40), (3, 17, 1, 40), causal=True)
    yield _ragged(kernel, (5, 33, 2), (9, 70, 2), causal=True, rotary=True)
    yield _ragged(kernel, (18, 2), (1, 35), causal=False, rotary=True)


def tiled_ragged_prefill(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """The same for our kernel, with more than a tile of queries and of keys. Keys are rotated before it gets them."""
    kernel = _Kernel.of(table, rng, scaling)
    yield _ragged(kernel, (1,), (1,), causal=True)
    yield _ragged(kernel, (3, 17, 0, 1, 40), (3, 17, 5, 1, 40), causal=True)
    yield _ragged(kernel, (18, 2), (1, 35), causal=False)
    yield _ragged(kernel, (20, 2), (5, 2), causal=True)  # queries that see nothing
    yield _ragged(kernel, (0, 131, 2), (7, 200, 2), causal=True)
    yield _ragged(kernel, (130,), (131,), causal=True)  # a tile whose last query alone sees another tile of keys


def _ragged(
    kernel: _Kernel, q_lengths: Sequence[int], kv_lengths: Sequence[int], *, causal: bool, rotary: bool = False
) -> Case:
    rng, q_indptr, kv_indptr = kernel.rng, np.cumsum([0, *q_lengths]), np.cumsum([0, *kv_lengths])
    q = kernel.random(q_indptr[-1], kernel.heads, kernel.dim)
    k, v = kernel.random(2, kv_indptr[-1], kernel.kv_heads, kernel.dim)
    positions, starts = ints(rng.integers(0, 90, len(q))), ints(rng.integers(0, 50, len(q_lengths)))
    parts = []
    for i, ((a, b), (c, d)) in enumerate(zip(pairwise(q_indptr), pairwise(kv_indptr), strict=True)):
        visible = causal_mask(b - a, d - c) if causal else np.ones((b - a, d - c), bool)
        query = kernel.rotated(q[a:b], positions[a:b], rotary)
        key = kernel.rotated(k[c:d], starts[i] + np.arange(d - c), rotary)
        parts.append(kernel.attend(query, key, v[c:d], visible))
    arguments = [q, ints(q_indptr), np.ascontiguousarray(k), np.ascontiguousarray(v), ints(kv_indptr), positions]
    label = f"q={tuple(q_lengths)} kv={tuple(kv_lengths)}" + " causal" * causal + " rotary" * rotary
    return kernel.case(label, [*arguments, starts], 7, parts, kernel.scalars(rotary, causal))


def paged_prefill(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """New tokens against pages; with a sliding window, cached positions come before the queries."""
    kernel = _Kernel.of(table, rng, scaling)
    if len(shape_of(table, "length_info")) == 1:
        yield _prefill(kernel, (1,), (1,), causal=True)
        yield _prefill(kernel, (5, 18, 3), (37, 0, 16), causal=False)
        yield _prefill(kernel, (33, 2, 1), (64, 17, 100), causal=True, rotary=True)
        return
    yield _prefill(kernel, (5, 2), (37, 16), ((0, 0), (4, 9)), causal=False)
    yield _prefill(kernel, (18, 3), (70, 33), ((2, 20), (0, 17)), causal=False, rotary=True)
    yield _prefill(kernel, (3,), (1030,), ((0, 0),), causal=True)


def tiled_paged_prefill(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """The same for our kernel, with more than a tile of queries and of keys. Keys are rotated in the cache.

    Of 33 queries at the end of 145 positions the first 16 see nothing of the third tile of 64 keys, and the first 15
    not all of the second.
    """
    kernel = _Kernel.of(table, rng, scaling)
    yield _prefill(kernel, (1,), (1,), causal=True)
    yield _prefill(kernel, (5, 18, 3), (37, 0, 16), causal=False)
    yield _prefill(kernel, (33, 2, 1), (145, 17, 100), causal=True)
    yield _prefill(kernel, (0, 131, 0, 3), (9, 190, 20, 0), causal=False)


def _prefill(
    kernel: _Kernel,
    q_lengths: Sequence[int],
    lengths: Sequence[int],
    windows: Sequence[tuple[int, int]] | None = None,
    *,
    causal: bool,
    rotary: bool = False,
) -> Case:
    rng, q_indptr = kernel.rng, np.cumsum([0, *q_lengths])
    q = kernel.random(q_indptr[-1], kernel.heads, kernel.dim)
    pages = _Pages(kernel, lengths, windows)
    memory = pages.arguments()
    positions, starts = ints(rng.integers(0, 90, len(q))), ints(rng.integers(0, 50, len(lengths)))

    def visible(_: int, n: int, m: int) -> Mask:
        if not causal:
            return np.ones((n, m), bool)
        return causal_mask(n, m) if windows is None else window_mask(n, m, _WINDOW)

    parts = _paged(kernel, q, q_indptr, pages, positions, starts, rotary, visible)
    label = f"q={tuple(q_lengths)} kv={tuple(lengths)}" + " causal" * causal + " rotary" * rotary
    return kernel.case(label, [q, ints(q_indptr), *memory, starts, positions], 8, parts, kernel.scalars(rotary, causal))


def sliding_decode(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """One token of each sequence against what its window keeps of its pages."""
    kernel = _Kernel.of(table, rng, scaling)
    for lengths, windows, rotary in (
        ((40,), ((0, 0),), False),
        ((100, 37), ((4, 20), (0, 18)), True),
        ((50, 16), ((2, 49), (0, 1)), False),
    ):
        yield _decode(kernel, lengths, rotary, windows)


def paged_decode(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """One token of each sequence against its pages, which our kernel takes in chunks.

    Their length follows from the length of the page table: with few pages it is a page, with very many the most there
    is. Entries that no sequence owns stand for the many. Keys are rotated when they come into the cache.

    66 pages are more chunks than `merge_chunks` adds up at once, on CUDA where up to 4 blocks share a chunk's heads, or
    up to 8 if these have 128 elements. With more heads chunks have more pages, and it has one step in almost any use.
    """
    kernel = _Kernel.of(table, rng, scaling)
    page: int = shape_of(table, "pages")[3]
    many = 160_000 // (page * kernel.kv_heads)
    for lengths, spare in (
        ((1,), 0),
        ((1, 100, 0, 48, page), 0),
        ((0, 65 * page + 5, 0), 0),
        ((3 * page, 0, 5 * page + 1), 0),
        ((600, 7), many),
    ):
        yield _decode(kernel, lengths, False, spare=spare)


def _decode(
    kernel: _Kernel,
    lengths: Sequence[int],
    rotary: bool,
    windows: Sequence[tuple[int, int]] | None = None,
    spare: int = 0,
) -> Case:
    q = kernel.random(len(lengths), kernel.heads, kernel.dim)
    pages = _Pages(kernel, lengths, windows, spare)
    memory = pages.arguments()
    positions, starts = ints(kernel.rng.integers(0, 90, len(q))), ints(kernel.rng.integers(0, 50, len(lengths)))
    indptr = np.arange(len(lengths) + 1)
    parts = _paged(kernel, q, indptr, pages, positions, starts, rotary, lambda _, n, m: np.ones((n, m), bool))
    label = f"kv={lengths}" + f" of {spare} more pages" * bool(spare) + " rotary" * rotary
    return kernel.case(label, [q, *memory, starts, positions], 7, parts, kernel.scalars(rotary))


def _paged(
    kernel: _Kernel,
    q: Array,
    q_indptr: Array,
    pages: _Pages,
    positions: Array,
    starts: Array,
    rotary: bool,
    visible: Callable[[int, int, int], Mask],
) -> list[tuple[Values, Values]]:
    parts = []
    for i, (a, b) in enumerate(pairwise(q_indptr)):
        query = kernel.rotated(q[a:b], positions[a:b], rotary)
        key = kernel.rotated(pages.k[i], starts[i] + np.arange(len(pages.k[i])), rotary)
        mask = visible(i, b - a, len(pages.k[i]))
        parts.append(kernel.attend(query, key, pages.v[i], mask))
    return parts


def _tree(size: int, rng: np.random.Generator) -> Array:
    """A random tree as `tree_mask` takes it, (size, 2). Nodes come after their parents."""
    parents = [-1, *(int(rng.integers(max(0, i - 3), i)) for i in range(1, size))]
    children: list[list[int]] = [[] for _ in range(size)]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    order = np.zeros((size, 2), np.int32)
    count = 0

    def walk(node: int) -> None:
        nonlocal count
        order[node, 0] = count
        count += 1
        for child in children[node]:
            walk(child)
        order[node, 1] = count

    walk(0)
    return order


def ragged_tree(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """Token trees whose keys and values lie beside the queries."""
    kernel = _Kernel.of(table, rng, scaling)
    for lengths, rotary in (((1,), False), ((7, 1, 33), False), ((20, 5), True)):
        indptr = np.cumsum([0, *lengths])
        q = kernel.random(indptr[-1], kernel.heads, kernel.dim)
        k, v = kernel.random(2, indptr[-1], kernel.kv_heads, kernel.dim)
        trees = [_tree(n, rng) for n in lengths]
        positions = ints(rng.integers(0, 90, len(q)))
        parts = []
        for tree, (a, b) in zip(trees, pairwise(indptr), strict=True):
            query, key = (kernel.rotated(x[a:b], positions[a:b], rotary) for x in (q, k))
            parts.append(attend(query, key, v[a:b], tree_mask(b - a, b - a, tree), kernel.softmax_scale, kernel.dtype))
        keys = [np.ascontiguousarray(k), np.ascontiguousarray(v)]
        arguments = [q, ints(indptr), *keys, ints(indptr), positions, ints(indptr), ints(np.concatenate(trees))]
        yield kernel.case(f"trees={lengths}" + " rotary" * rotary, arguments, 8, parts, kernel.scalars(rotary))


def paged_tree(table: Table, rng: np.random.Generator, scaling: Llama3Rope | None) -> Iterator[Case]:
    """Token trees at the end of cached sequences; the queries are the tree's last nodes."""
    kernel = _Kernel.of(table, rng, scaling)
    rotary = False  # TVM's host code refuses the other
    for q_lengths, trees_of, lengths in (
        ((1,), (1,), (1,)),
        ((7, 4, 33), (7, 6, 33), (50, 6, 70)),
        ((5, 18), (5, 18), (16, 40)),
    ):
        q_indptr = np.cumsum([0, *q_lengths])
        q = kernel.random(q_indptr[-1], kernel.heads, kernel.dim)
        pages = _Pages(kernel, lengths)
        memory = pages.arguments()
        trees = [_tree(n, rng) for n in trees_of]
        positions, starts = ints(rng.integers(0, 90, len(q))), ints(rng.integers(0, 50, len(lengths)))

        def visible(i: int, n: int, m: int, trees: list[Array] = trees) -> Mask:
            return tree_mask(n, m, trees[i])

        parts = _paged(kernel, q, q_indptr, pages, positions, starts, rotary, visible)
        arguments = [q, ints(q_indptr), *memory, starts, positions]
        after = [*kernel.scalars(rotary), ints(np.cumsum([0, *trees_of])), ints(np.concatenate(trees))]
        yield kernel.case(f"trees={trees_of} kv={lengths}", arguments, 8, parts, after)
