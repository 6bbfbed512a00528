"""What the chunks of a decode step's positions leave in memory, and the kernel that makes one result of them.

Each chunk has m, l and o, see `gpu_attention`: M = max m, L = sum 2^(m - M) l, out = sum 2^(m - M) o / L, and
lse = M + log2 L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.attention import LEAST, LOWEST, AttentionShape, Call, float32
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import Registers, barrier, kept, load_vectors

Expr = Any
Buffer = Any

_AHEAD: Final = 4  # chunks that a thread reads at once


@dataclass(frozen=True)
class Partial:
    """The chunks' results (slots, Hq, D + 4): o, m, l, and what keeps rows aligned to vectors."""

    shape: AttentionShape
    memory: Buffer

    @staticmethod
    def floats(shape: AttentionShape) -> int:
        """Of a slot."""
        return shape.heads * (shape.head_dim + 4)

    def output(self, slot: Expr, head: Expr, d: Expr) -> Expr:
        """Of element d of o."""
        return (slot * self.shape.heads + head) * (self.shape.head_dim + 4) + d

    def state(self, slot: Expr, head: Expr) -> Expr:
        """Of m; l is next."""
        return self.output(slot, head, self.shape.head_dim)


def merge_chunks(partial: Partial, call: Call, indptr: Buffer, per_chunk: Expr, threads: int) -> None:
    """The second kernel: a block for a query head of a sequence, whose rows of threads share the chunks."""
    shape, memory, out, lse = partial.shape, partial.memory, call.out, call.lse
    dim = shape.head_dim
    lanes = math.gcd(dim, 4)
    columns = dim // lanes
    rows = max(1, min(threads // columns, 16))
    with (
        T.launch_thread("blockIdx.x", shape.heads) as head,
        T.launch_thread("blockIdx.y", call.b) as i,
        T.launch_thread("threadIdx.x", columns) as tx,
        T.launch_thread("threadIdx.y", rows) as ty,
    ):
        begin = kept(indptr[i])
        chunks = kept(tirx.truncdiv(indptr[i + 1] - begin + per_chunk - 1, per_chunk))
        slot = kept(tirx.truncdiv(begin, per_chunk) + i)
        state, sums = Registers(2), Registers(lanes)  # m and l; o
        state[0], state[1] = float32(LEAST), float32(0)
        for e in range(lanes):
            sums[e] = float32(0)
        tops, weights, found, factor = Registers(_AHEAD), Registers(_AHEAD), Registers(_AHEAD * lanes), Registers(1)
        at_once = rows * _AHEAD
        with T.serial(0, tirx.floordiv(chunks + (at_once - 1), at_once)) as step:
            for n in range(_AHEAD):
                chunk = (step * _AHEAD + n) * rows + ty
                place = kept(slot + tirx.min(chunk, chunks - 1))
                m_at = partial.state(place, head)
                tops[n] = tirx.if_then_else(chunk < chunks, memory[m_at], float32(LEAST))
                weights[n] = tirx.if_then_else(chunk < chunks, memory[m_at + 1], float32(0))
                read = load_vectors(lambda at: memory[at], partial.output(place, head, tx * lanes), lanes, lanes)
                for e, value in enumerate(read):
                    found[n * lanes + e] = value
            m = tops[0]
            for n in range(1, _AHEAD):
                m = tirx.max(m, tops[n])
            m = kept(tirx.max(m, state[0]), "float32")
            factor[0] = tirx.exp2(state[0] - m)
            state[0] = m
            state[1] = state[1] * factor[0]
            for e in range(lanes):
                sums[e] = sums[e] * factor[0]
            for n in range(_AHEAD):
                chunk = (step * _AHEAD + n) * rows + ty
                factor[0] = tirx.if_then_else(chunk < chunks, tirx.exp2(tops[n] - m), float32(0))
                state[1] = state[1] + factor[0] * weights[n]
                for e in range(lanes):
                    sums[e] = sums[e] + factor[0] * found[n * lanes + e]
        of_rows, states = (T.alloc_buffer((n,), "float32", scope="shared") for n in (rows * dim, 2 * rows))
        T.buffer_store(of_rows, sums.vector(0, lanes), [ramp(ty * dim + tx * lanes, lanes)])
        with T.If(tx == 0), T.Then():
            T.buffer_store(states, state[0], [ty])
            T.buffer_store(states, state[1], [rows + ty])
        barrier()
        with T.If(ty == 0), T.Then():
            state[0], state[1] = float32(LEAST), float32(0)
            for e in range(lanes):
                sums[e] = float32(0)
            with T.serial(0, rows) as r:
                state[0] = tirx.max(state[0], states[r])
            with T.serial(0, rows) as r:
                factor[0] = tirx.exp2(states[r] - state[0])
                state[1] = state[1] + factor[0] * states[rows + r]
                read = load_vectors(lambda at: of_rows[at], r * dim + tx * lanes, lanes, lanes)
                for e, value in enumerate(read):
                    sums[e] = sums[e] + factor[0] * value
            inverse = kept(tirx.if_then_else(chunks > 0, 1.0 / state[1], float32(0)), "float32")
            for e in range(lanes):
                T.buffer_store(out, cast(shape.dtype, sums[e] * inverse, 1), [i, head, tx * lanes + e])
            with T.If(tx == 0), T.Then():
                full = tirx.if_then_else(chunks > 0, state[0] + tirx.log2(state[1]), float32(LOWEST))
                T.buffer_store(lse, full, [i, head])
