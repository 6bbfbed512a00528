"""Attention on a paged KV cache for machines with vector registers, with the signatures of TVM's KV cache.

TVM's own CPU kernels are serial scalar loops. These keep the softmax running over blocks of positions
(a page) and count scores in powers of two, s = q·k * scale * log2(e), as TVM's state merging expects:

    m' = max(m, max s),  a = 2^(m - m'),  p = 2^(s - m'),  l' = l a + sum p,  o' = o a + sum p v
    at the end: out = o / l,  lse = m + log2(l)

Hq query heads read Hkv key/value heads, G = Hq / Hkv each; D elements per head. With many queries
(`ragged_prefill`, `paged_prefill`) lanes run along rows, a row being one query head of one token, so that
nothing is summed across lanes. With one token (`paged_decode`) lanes run along D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.attention import (
    LOWEST,
    AttentionShape,
    Call,
    attention_function,
    decode_call,
    int32_view,
    paged_call,
    ragged_call,
)
from awq_compile.kernels.simd import cast, ramp, total, zeros

Expr = Any
Buffer = Any

_VECTORS: Final = 2  # vectors of rows per tile
# 2^f on [-1/2, 1/2], relative error below 1e-8.
_EXP2: Final = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef
)


def exp2(x: Expr, lanes: int) -> Expr:
    """2^x of a float32 vector, 0 below 2^-126."""
    low = tirx.Broadcast(tirx.const(-126, "float32"), lanes)
    clamped = T.bind(tirx.max(x, low))
    whole = T.bind(tirx.floor(clamped + 0.5))
    f = T.bind(clamped - whole)
    value: Expr = tirx.Broadcast(tirx.const(float(_EXP2[-1]), "float32"), lanes)
    for coefficient in _EXP2[-2::-1]:
        value = T.bind(value * f + float(coefficient))
    power = T.reinterpret(f"float32x{lanes}", (cast("int32", whole, lanes) + 127) << 23)
    return T.bind(tirx.Select(x < low, zeros(lanes), value * power))


def _highest(value: Expr, lanes: int) -> Expr:
    """Largest lane, by halves."""
    while lanes > 1:
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        value = T.bind(tirx.max(tirx.Shuffle([value], low), tirx.Shuffle([value], high)))
    return value


def ragged_prefill(shape: AttentionShape) -> Any:
    """Attention of new tokens to themselves: k and v (m, Hkv, D) are those of the same call."""
    with attention_function("attention_ragged_prefill") as builder:
        call, source = ragged_call(shape)
        with T.serial(0, call.b) as i:
            first = T.bind(source.indptr[i])

            def block_reader(head: Expr, _block: Expr, first: Expr = first) -> tuple[_Element, _Element]:
                return (lambda p, d: source.k[first + p, head, d]), (lambda p, d: source.v[first + p, head, d])

            _attend(shape, call, i, T.bind(source.length(i)), block_reader)
    return builder.get()


def paged_prefill(shape: AttentionShape) -> Any:
    """Attention of new tokens to the pages of their sequences."""
    with attention_function("attention_paged_prefill") as builder:
        call, source = paged_call(shape)
        with T.serial(0, call.b) as i:
            first = T.bind(source.indptr[i])

            def block_reader(head: Expr, block: Expr, first: Expr = first) -> tuple[_Element, _Element]:
                page, start = T.bind(source.values[first + block]), block * shape.page
                return (lambda p, d: source.memory[page, 0, head, p - start, d]), (
                    lambda p, d: source.memory[page, 1, head, p - start, d]
                )

            _attend(shape, call, i, T.bind(source.length(i)), block_reader)
    return builder.get()


_Element = Callable[[Expr, Expr], Expr]  # element d of the key (or value) at position p


def _attend(
    s: AttentionShape,
    call: Call,
    i: Expr,
    length: Expr,
    block_reader: Callable[[Expr, Expr], tuple[_Element, _Element]],
) -> None:
    """Sequence i's tokens of q against `length` positions, read by `block_reader(head, block)`.

    Row r of a head is query head r % G of token r // G. A tile of 2 vectors of rows is one task.
    """
    lanes, vectors, dim, group = s.lanes, _VECTORS, s.head_dim, s.group
    width = lanes * vectors
    q, out, lse, causal, sm_scale = call.q, call.out, call.lse, call.causal, call.sm_scale
    q_first = T.bind(call.q_indptr[i])
    tokens = T.bind(call.q_indptr[i + 1] - q_first)
    rows = T.bind(tokens * group)
    tiles = T.bind((rows + (width - 1)) // width)
    with T.parallel(0, tiles * s.kv_heads) as task:
        head = T.bind(task // tiles)
        turn = T.bind(task % tiles)
        # Late tiles see more keys than early ones: taken from both ends in turn, tasks side by side add up alike.
        tile = T.bind(tirx.Select(turn % 2 == 0, turn // 2, tiles - 1 - turn // 2))
        base = T.bind(tile * width)
        q_t = T.alloc_buffer((dim, width), "float32")
        o_t = T.alloc_buffer((dim, width), "float32")
        scores = T.alloc_buffer((s.page, width), "float32")
        state = T.alloc_buffer((3, width), "float32")  # m, l, a
        visible = T.alloc_buffer((width,), "int32")
        with T.serial(0, width) as lane:
            r = T.bind(tirx.min(base + lane, rows - 1))
            token = T.bind(r // group)
            seen = tirx.Select(causal > 0, length - tokens + token + 1, length)
            T.buffer_store(visible, seen, [lane])
            with T.serial(0, dim) as d:
                value = cast("float32", q[q_first + token, head * group + r % group, d], 1)
                T.buffer_store(q_t, value * (sm_scale * math.log2(math.e)), [d, lane])
        for v in range(vectors):
            part = ramp(v * lanes, lanes)
            T.buffer_store(state, tirx.Broadcast(tirx.const(LOWEST, "float32"), lanes), [0, part])
            T.buffer_store(state, tirx.Broadcast(tirx.const(1, "float32"), lanes), [1, part])
            with T.serial(0, dim) as d:
                T.buffer_store(o_t, zeros(lanes), [d, part])
        end = T.bind(tirx.min(length, visible[width - 1]))
        with T.serial(0, (end + (s.page - 1)) // s.page) as block:
            start = T.bind(block * s.page)
            key, value = block_reader(head, block)
            # Positions past the end repeat the last one and are masked: their memory may hold anything.
            last = T.bind(length - 1)
            _scores(s, q_t, scores, lambda p, d: key(tirx.min(start + p, last), d))
            with T.serial(0, vectors) as v:
                _softmax(s, scores, state, visible, start, ramp(v * lanes, lanes))
            _add_values(s, o_t, scores, state, lambda p, d: value(tirx.min(start + p, last), d))
        with T.serial(0, tirx.min(rows - base, width)) as lane:
            r = T.bind(base + lane)
            token, q_head = T.bind(q_first + r // group), T.bind(head * group + r % group)
            inverse = T.bind(1.0 / state[1, lane])
            with T.serial(0, dim) as d:
                T.buffer_store(out, cast(s.dtype, o_t[d, lane] * inverse, 1), [token, q_head, d])
            T.buffer_store(lse, state[0, lane] + tirx.log2(state[1, lane]), [token, q_head])


def _scores(s: AttentionShape, q_t: Buffer, scores: Buffer, key: _Element) -> None:
    """scores[p] = sum_d q_t[d] * key[p, d], with the sums of 4 positions in registers."""
    lanes, tile = s.lanes, 4
    acc = T.alloc_buffer((tile * _VECTORS * lanes,), "float32", scope="local")
    slots = {(p, v): ramp((p * _VECTORS + v) * lanes, lanes) for p in range(tile) for v in range(_VECTORS)}
    with T.serial(0, s.page // tile) as outer:
        for slot in slots.values():
            T.buffer_store(acc, zeros(lanes), [slot])
        with T.serial(0, s.head_dim) as d:
            queries = [T.bind(q_t[d, ramp(v * lanes, lanes)]) for v in range(_VECTORS)]
            for p in range(tile):
                element = T.bind(cast("float32", key(outer * tile + p, d), 1))
                for v, query in enumerate(queries):
                    T.buffer_store(acc, acc[slots[p, v]] + query * element, [slots[p, v]])
        for (p, v), slot in slots.items():
            T.buffer_store(scores, acc[slot], [outer * tile + p, ramp(v * lanes, lanes)])


def _softmax(s: AttentionShape, scores: Buffer, state: Buffer, visible: Buffer, start: Expr, part: Expr) -> None:
    """Replaces the block's scores by their weights p and brings m, l and a up to date."""
    lanes = s.lanes
    local = T.alloc_buffer((2 * lanes,), "float32", scope="local")
    highest, weights = ramp(0, lanes), ramp(lanes, lanes)
    seen, before = T.bind(visible[part]), T.bind(state[0, part])
    lowest = tirx.Broadcast(tirx.const(LOWEST, "float32"), lanes)
    T.buffer_store(local, before, [highest])
    with T.serial(0, s.page) as p:
        masked = T.bind(tirx.Select(tirx.Broadcast(start + p, lanes) < seen, scores[p, part], lowest))
        T.buffer_store(scores, masked, [p, part])
        T.buffer_store(local, tirx.max(local[highest], masked), [highest])
    after = T.bind(local[highest])
    shrink = exp2(before - after, lanes)
    T.buffer_store(local, state[1, part] * shrink, [weights])
    with T.serial(0, s.page) as p:
        weight = exp2(scores[p, part] - after, lanes)
        T.buffer_store(scores, weight, [p, part])
        T.buffer_store(local, local[weights] + weight, [weights])
    for i, value in enumerate((after, local[weights], shrink)):
        T.buffer_store(state, value, [i, part])


def _add_values(s: AttentionShape, o_t: Buffer, scores: Buffer, state: Buffer, value: _Element) -> None:
    """o_t[d] = o_t[d] * a + sum_p scores[p] * value[p, d], a few d at a time."""
    lanes, tile = s.lanes, math.gcd(4, s.head_dim)
    acc = T.alloc_buffer((tile * _VECTORS * lanes,), "float32", scope="local")
    slots = {(i, v): ramp((i * _VECTORS + v) * lanes, lanes) for i in range(tile) for v in range(_VECTORS)}
    with T.serial(0, s.head_dim // tile) as outer:
        for (i, v), slot in slots.items():
            part = ramp(v * lanes, lanes)
            T.buffer_store(acc, o_t[outer * tile + i, part] * state[2, part], [slot])
        with T.serial(0, s.page) as p:
            weights = [T.bind(scores[p, ramp(v * lanes, lanes)]) for v in range(_VECTORS)]
            for i in range(tile):
                element = T.bind(cast("float32", value(p, outer * tile + i), 1))
                for v, weight in enumerate(weights):
                    T.buffer_store(acc, acc[slots[i, v]] + weight * element, [slots[i, v]])
        for (i, v), slot in slots.items():
            T.buffer_store(o_t, acc[slot], [outer * tile + i, ramp(v * lanes, lanes)])


def paged_decode(shape: AttentionShape) -> Any:
    """Attention of one new token per sequence to its pages, its own position among them."""
    s = shape
    lanes, group = s.head_lanes, s.group
    vectors = s.head_dim // lanes
    with attention_function("attention_paged_decode") as builder:
        call, source = decode_call(s)
        q, out, lse, sm_scale = call.q, call.out, call.lse, call.sm_scale
        with T.parallel(0, call.b * s.kv_heads) as task:
            i, head = T.bind(task // s.kv_heads), T.bind(task % s.kv_heads)
            queries = T.alloc_buffer((group, s.head_dim), "float32")
            sums = T.alloc_buffer((group, s.head_dim), "float32")
            scores = T.alloc_buffer((group, s.page), "float32")
            state = T.alloc_buffer((2, group), "float32")  # m, l
            columns = [ramp(v * lanes, lanes) for v in range(vectors)]
            scale = T.bind(sm_scale * math.log2(math.e))
            with T.serial(0, group) as g:
                T.buffer_store(state, tirx.const(LOWEST, "float32"), [0, g])
                T.buffer_store(state, tirx.const(1, "float32"), [1, g])
                for column in columns:
                    query = cast("float32", q[i, head * group + g, column], lanes)
                    T.buffer_store(queries, query * scale, [g, column])
                    T.buffer_store(sums, zeros(lanes), [g, column])
            first = T.bind(source.indptr[i])
            length = T.bind(source.length(i))
            with T.serial(0, (length + (s.page - 1)) // s.page) as block:
                page = T.bind(source.values[first + block])
                used = T.bind(tirx.min(length - block * s.page, s.page))
                with T.serial(0, used) as p:
                    key = [T.bind(cast("float32", source.memory[page, 0, head, p, c], lanes)) for c in columns]
                    with T.serial(0, group) as g:
                        score = queries[g, columns[0]] * key[0]
                        for v in range(1, vectors):
                            score = score + queries[g, columns[v]] * key[v]
                        T.buffer_store(scores, total(T.bind(score), lanes), [g, p])
                with T.serial(0, group) as g:
                    _decode_softmax(s.page, scores, sums, state, g, used, columns)
                with T.serial(0, used) as p:
                    value = [T.bind(cast("float32", source.memory[page, 1, head, p, c], lanes)) for c in columns]
                    with T.serial(0, group) as g:
                        weight = T.bind(scores[g, p])
                        for v, column in enumerate(columns):
                            T.buffer_store(sums, sums[g, column] + value[v] * weight, [g, column])
            with T.serial(0, group) as g:
                inverse = T.bind(1.0 / state[1, g])
                for column in columns:
                    T.buffer_store(out, cast(s.dtype, sums[g, column] * inverse, lanes), [i, head * group + g, column])
                T.buffer_store(lse, state[0, g] + tirx.log2(state[1, g]), [i, head * group + g])
    return builder.get()


def _decode_softmax(
    page: int, scores: Buffer, sums: Buffer, state: Buffer, g: Expr, used: Expr, columns: list[Expr]
) -> None:
    """One head's block of scores becomes weights; its state and sums are brought up to date."""
    every = ramp(0, page)
    lowest = tirx.Broadcast(tirx.const(LOWEST, "float32"), page)
    live = T.ramp(tirx.const(0, "int32"), 1, page) < tirx.Broadcast(used, page)
    T.buffer_store(scores, tirx.Select(live, scores[g, every], lowest), [g, every])
    score = T.bind(scores[g, every])
    before = T.bind(state[0, g])
    highest = T.bind(tirx.max(before, _highest(score, page)))
    shrink = T.bind(tirx.exp2(before - highest))
    weight = exp2(score - tirx.Broadcast(highest, page), page)
    T.buffer_store(scores, weight, [g, every])
    T.buffer_store(state, highest, [0, g])
    # Loaded again, not `total(weight)`: code generation takes time exponential in nested uses of bound values.
    T.buffer_store(state, state[1, g] * shrink + total(T.bind(scores[g, every]), page), [1, g])
    for column in columns:
        T.buffer_store(sums, sums[g, column] * shrink, [g, column])


def merge_state(shape: AttentionShape) -> Any:
    """Joins two attention results over disjoint positions, into the first."""
    s = shape
    lanes = s.head_lanes
    n = tirx.Var("n", "int32")
    with attention_function("attention_merge_state") as builder:
        v = T.arg("v", T.buffer((n, s.heads, s.head_dim), s.dtype))
        lse = T.arg("lse", T.buffer((n, s.heads), "float32"))
        v_other = T.arg("v_other", T.buffer((n, s.heads, s.head_dim), s.dtype))
        lse_other = T.arg("lse_other", T.buffer((n, s.heads), "float32"))
        with T.parallel(0, n) as i, T.serial(0, s.heads) as head:
            highest = T.bind(tirx.max(lse[i, head], lse_other[i, head]))
            mine = T.bind(tirx.exp2(lse[i, head] - highest))
            other = T.bind(tirx.exp2(lse_other[i, head] - highest))
            both = T.bind(mine + other)
            for first in range(0, s.head_dim, lanes):
                at = [i, head, ramp(first, lanes)]
                a, b = cast("float32", v[tuple(at)], lanes), cast("float32", v_other[tuple(at)], lanes)
                T.buffer_store(v, cast(s.dtype, a * (mine / both) + b * (other / both), lanes), at)
            T.buffer_store(lse, tirx.log2(both) + highest, [i, head])
    return builder.get()


def split_rotary(shape: AttentionShape, frequencies: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
    """q, k and v out of qkv (n, Hq + 2*Hkv, D), q and k rotated by position * frequencies (D/2,).

    Element d < D/2 and d + D/2 turn together. The angle's sine and cosine are taken once per token.
    """
    s = shape
    half = s.head_dim // 2
    lanes = math.gcd(s.lanes, half)
    n = tirx.Var("n", "int32")
    with attention_function("attention_split_rotary") as builder:
        qkv = T.arg("qkv", T.buffer((n, s.heads + 2 * s.kv_heads, s.head_dim), s.dtype))
        position_map = int32_view("position_map", n)
        q = T.arg("q", T.buffer((n, s.heads, s.head_dim), s.dtype))
        k = T.arg("k", T.buffer((n, s.kv_heads, s.head_dim), s.dtype))
        v = T.arg("v", T.buffer((n, s.kv_heads, s.head_dim), s.dtype))
        apply_rope = T.arg("apply_rope", tirx.Var("apply_rope", "int64"))
        with T.parallel(0, n) as i:
            turn = T.alloc_buffer((2, half), "float32")  # cosines, sines
            position = T.bind(cast("float32", tirx.Select(apply_rope > 0, position_map[i], 0), 1))
            for d, frequency in enumerate(frequencies):
                angle = T.bind(position * float(frequency))
                T.buffer_store(turn, tirx.cos(angle), [0, d])
                T.buffer_store(turn, tirx.sin(angle), [1, d])
            for rotated, first, count in ((q, 0, s.heads), (k, s.heads, s.kv_heads)):
                with T.serial(0, count) as head:
                    for d in range(0, half, lanes):
                        low, high = ramp(d, lanes), ramp(half + d, lanes)
                        cosine, sine = T.bind(turn[0, low]), T.bind(turn[1, low])
                        a = T.bind(cast("float32", qkv[i, first + head, low], lanes))
                        b = T.bind(cast("float32", qkv[i, first + head, high], lanes))
                        T.buffer_store(rotated, cast(s.dtype, a * cosine - b * sine, lanes), [i, head, low])
                        T.buffer_store(rotated, cast(s.dtype, b * cosine + a * sine, lanes), [i, head, high])
            with T.serial(0, s.kv_heads) as head:
                for d in range(0, s.head_dim, s.head_lanes):
                    at = ramp(d, s.head_lanes)
                    T.buffer_store(v, qkv[i, s.heads + s.kv_heads + head, at], [i, head, at])
    return builder.get()
