"""Attention as the runtime's KV cache calls it: sizes, and the arguments of its three kinds of calls.

The signatures are TVM's (`tvm.relax.frontend.nn.llm.kv_cache`). Rows of q, k and v of several sequences lie one behind
the other, those of sequence i from indptr[i] on; or keys and values lie in pages, those of sequence i in the pages
values[indptr[i]] … values[indptr[i + 1] - 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.simt import Registers

Expr = Any
Buffer = Any

LOWEST: Final = -5e4  # a score that counts for nothing, TVM's choice
LEAST: Final = -3e38  # below every score


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that the kernels are compiled for. `lanes` is the widest vector, a power of two.

    `page`: positions of a page of the cache, which the kernels take together.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    lanes: int = 16
    page: int = 16

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def head_lanes(self) -> int:
        """Widest vector that divides the head."""
        return math.gcd(self.lanes, self.head_dim)


@dataclass(frozen=True)
class Call:
    """Queries (n, Hq, D) of b sequences, and where results go: out (n, Hq, D), lse (n, Hq) in powers of two.

    A step of decoding has a query for each sequence, n = b, and neither `q_indptr` (b + 1,) nor `causal`.
    """

    b: Expr
    n: Expr
    q: Buffer
    q_indptr: Buffer
    out: Buffer
    lse: Buffer
    causal: Expr
    sm_scale: Expr


@dataclass(frozen=True)
class Ragged:
    """Keys and values (m, Hkv, D) that lie one behind the other."""

    shape: AttentionShape
    k: Buffer
    v: Buffer
    indptr: Buffer

    def length(self, i: Expr) -> Expr:
        """Positions of sequence i."""
        return self.indptr[i + 1] - self.indptr[i]

    def entry(self, i: Expr, position: Expr) -> Expr:
        """Which row of k and v a position is; see `address`."""
        return self.indptr[i] + position

    def address(self, entry: Expr, position: Expr, head: Expr, element: Expr, part: int) -> Expr:
        """Of an element of the key (`part` 0) or value (1) of a position with its entry."""
        offset = (entry * self.shape.kv_heads + head) * self.shape.head_dim + element
        return (self.v if part else self.k).access_ptr("r", offset=offset)


@dataclass(frozen=True)
class Pages:
    """Keys and values in the pages (P, 2, Hkv, page, D) of a cache; `last` has the positions of each last page."""

    shape: AttentionShape
    memory: Buffer
    indptr: Buffer
    values: Buffer
    last: Buffer

    def length(self, i: Expr) -> Expr:
        """Positions of sequence i: whole pages, and what the last one holds, which is a position at least."""
        pages = self.indptr[i + 1] - self.indptr[i]
        return tirx.Select(pages > 0, (pages - 1) * self.shape.page + self.last[i], tirx.const(0, "int32"))

    def page(self, first: Expr, position: Expr) -> Expr:
        """The page of a position, counted from the beginning of page values[first] on."""
        return self.values[first + tirx.floordiv(position, self.shape.page)]

    def place(self, page: Expr, position: Expr) -> tuple[Expr, Expr]:
        """(page, position within it) as indices of `memory`: a layer's cache may have more than 2^31 elements."""
        return tirx.Cast("int64", page), tirx.floormod(position, self.shape.page)

    def entry(self, i: Expr, position: Expr) -> Expr:
        """The page of a position; see `address`."""
        return self.page(self.indptr[i], position)

    def address(self, entry: Expr, position: Expr, head: Expr, element: Expr, part: int) -> Expr:
        """As of `Ragged`."""
        page, within = self.place(entry, position)
        row = ((page * 2 + part) * self.shape.kv_heads + head) * self.shape.page + within
        return self.memory.access_ptr("r", offset=row * self.shape.head_dim + element)


@contextmanager
def attention_function(name: str) -> Iterator[IRBuilder]:
    """A PrimFunc, scheduled."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        yield builder


def ragged_call(shape: AttentionShape) -> tuple[Call, Ragged]:
    """The arguments where new tokens attend to the keys and values of the same call."""
    n, m, b = tirx.Var("n", "int32"), tirx.Var("m", "int32"), tirx.Var("b", "int32")
    q, q_indptr = _rows("q", n, shape.heads, shape), int32_view("q_indptr", b + 1)
    k, v = _rows("k", m, shape.kv_heads, shape), _rows("v", m, shape.kv_heads, shape)
    source = Ragged(shape, k, v, int32_view("kv_indptr", b + 1))
    int32_view("q_rope_position", n)
    int32_view("k_rope_pos_offset", b)
    return Call(b, n, q, q_indptr, *_results(n, shape, causal=True)), source


def paged_call(shape: AttentionShape) -> tuple[Call, Pages]:
    """The arguments where new tokens attend to pages."""
    n, b = tirx.Var("n", "int32"), tirx.Var("b", "int32")
    q, q_indptr, source = _rows("q", n, shape.heads, shape), int32_view("q_indptr", b + 1), _pages(shape, b)
    int32_view("k_rope_pos_offset", b)
    int32_view("q_rope_position", n)
    return Call(b, n, q, q_indptr, *_results(n, shape, causal=True)), source


def decode_call(shape: AttentionShape) -> tuple[Call, Pages]:
    """The arguments where one new token of each sequence attends to pages, its own position among them."""
    b = tirx.Var("b", "int32")
    q, source = _rows("q", b, shape.heads, shape), _pages(shape, b)
    int32_view("k_rope_pos_offset", b)
    int32_view("q_rope_position", b)
    return Call(b, b, q, None, *_results(b, shape, causal=False)), source


def sequence_at(place: Expr, indptr: Buffer, b: Expr, *, scale: int, per_place: Expr) -> Expr:
    """Which of b sequences a place belongs to, where sequence i has them from ⌊scale indptr[i] / per_place⌋ + i on.

    Places of neighbours never meet, since ⌊(a + n) / c⌋ + 1 ≥ ⌊a / c⌋ + ⌈n / c⌉, and the host knows a bound of their
    number.
    """
    found = Registers(1, "int32")
    found[0] = tirx.const(0, "int32")
    with T.serial(1, b) as i:
        begins = indptr[i] * scale < (place - i + 1) * per_place
        found[0] = found[0] + tirx.Cast("int32", begins)
    return found[0]


def float32(value: float) -> Expr:
    """A constant."""
    return tirx.const(value, "float32")


def int32_view(name: str, *shape: Expr) -> Buffer:
    """An auxiliary array: the cache passes views that begin anywhere in one buffer."""
    return T.arg(name, T.buffer(shape, "int32", elem_offset=tirx.Var(f"{name}_offset", "int32")))


def _rows(name: str, count: Expr, heads: int, shape: AttentionShape) -> Buffer:
    return T.arg(name, T.buffer((count, heads, shape.head_dim), shape.dtype))


def _pages(s: AttentionShape, b: Expr) -> Pages:
    count, used = tirx.Var("num_pages", "int32"), tirx.Var("nnz_pages", "int32")
    memory = T.arg("pages", T.buffer((count, 2, s.kv_heads, s.page, s.head_dim), s.dtype))
    indptr, values = int32_view("page_indptr", b + 1), int32_view("page_values", used)
    return Pages(s, memory, indptr, values, int32_view("length_info", b))


def _results(n: Expr, shape: AttentionShape, *, causal: bool) -> tuple[Buffer, Buffer, Expr, Expr]:
    """out, lse, causal, sm_scale. Rotation within attention, three more, is for cache modes that we do not create."""
    out, lse = _rows("out", n, shape.heads, shape), T.arg("lse", T.buffer((n, shape.heads), "float32"))
    is_causal = T.arg("causal", tirx.Var("causal", "int32")) if causal else None
    for name, dtype in (("rotary_mode", "int32"), ("rope_scale", "float32"), ("rope_theta", "float32")):
        T.arg(name, tirx.Var(name, dtype))
    return out, lse, is_causal, T.arg("sm_scale", tirx.Var("sm_scale", "float32"))
