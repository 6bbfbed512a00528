"""Attention of new tokens on CUDA's tensor cores, with the signatures of TVM's KV cache.

Scores are never in memory (Dao et al. 2022, "FlashAttention"): a block keeps a tile of queries, passes over the keys
and values in tiles, and the softmax runs along, in base 2 and with s = q·k * sm_scale * log2(e):

    m' = max(m, max s),  a = 2^(m - m'),  p = 2^(s - m'),  l' = l a + sum p,  o' = o a + sum p v
    at the end: out = o / l,  lse = m + log2(l)

Row r of a key/value head's tile is query head r % G of token r / G, so that G = Hq / Hkv heads share what is read.
Products are those of `mma.m16n8k16`: a warp has 16 rows, lane l = 4 g + t of it rows g and g + 8. The sums of q·k are,
as they lie, the operand p of the second product: a float16 and, as a second operand, what that leaves out, so that p is
as good as in float32 and `out` is rounded once.

`attention.sequence_at` says which sequence a block's tile is of. Later tiles see more keys and start first.
"""

from __future__ import annotations

import math
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.attention import (
    LEAST,
    LOWEST,
    AttentionShape,
    Call,
    Pages,
    Ragged,
    attention_function,
    float32,
    paged_call,
    ragged_call,
    sequence_at,
)
from awq_compile.kernels.mma_weights import call, local, pointer, zeros
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import Registers, barrier, branch, kept

Expr = Any
Buffer = Any

_WARPS: Final = 8
_ROWS: Final = 16  # of a warp
_TILE: Final = _WARPS * _ROWS  # rows of a block
_PIECE: Final = 8  # halves that are copied at a time


def supports(shape: AttentionShape) -> bool:
    """Whether heads are whole operands, and a thread's sums fit into registers."""
    return shape.dtype == "float16" and shape.head_dim % 16 == 0 and shape.head_dim <= 256


def ragged_prefill(shape: AttentionShape, name: str) -> Any:
    """The PrimFunc: q (n, Hq, D) against the k and v (m, Hkv, D) of the same call → out (n, Hq, D), lse (n, Hq)."""
    with attention_function(name) as builder:
        _attend(shape, *ragged_call(shape))
    return builder.get()


def paged_prefill(shape: AttentionShape, name: str) -> Any:
    """The PrimFunc: q (n, Hq, D) against the pages (P, 2, Hkv, page, D) of their sequences → out (n, Hq, D), lse."""
    with attention_function(name) as builder:
        _attend(shape, *paged_call(shape))
    return builder.get()


def _attend(shape: AttentionShape, of: Call, source: Ragged | Pages) -> None:
    """A block for a tile of rows of one sequence and key/value head."""
    slots = T.bind(tirx.floordiv(of.n * shape.group, _TILE) + of.b)
    with (
        T.launch_thread("blockIdx.x", slots) as bx,
        T.launch_thread("blockIdx.y", shape.kv_heads) as head,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", _WARPS) as warp,
    ):
        slot = kept(slots - 1 - bx)
        i = sequence_at(slot, of.q_indptr, of.b, scale=shape.group, per_place=_TILE)
        begin = kept(of.q_indptr[i])
        tokens = kept(of.q_indptr[i + 1] - begin)
        first = kept((slot - i - tirx.truncdiv(begin * shape.group, _TILE)) * _TILE)
        length = kept(source.length(i))
        tile = _Tile(shape, begin, tokens, first, length, of.causal, head, lane, warp)
        keys = _Keys(shape, source, i, length, head, kept(warp * 32 + lane))
        tiles = kept(tirx.truncdiv(tile.seen() + (keys.count - 1), keys.count))
        scale = kept(of.sm_scale * math.log2(math.e), "float32")
        state = _State(shape, keys.count)
        with T.If(tiles > 0), T.Then():
            keys.prepare(0)
            keys.load(0, 0)
            keys.prepare(1)
            tile.load(of.q, state.q)
        call("awq_cp_async_commit")
        with T.serial(0, tiles) as number:
            with T.If(number + 1 < tiles), T.Then():
                keys.load(number + 1, (number + 1) % 2)
                keys.prepare(number + 2)
            call("awq_cp_async_commit")
            call("awq_cp_async_wait_1")
            barrier()  # this tile has arrived for all
            base = T.bind(number % 2 * keys.size)
            state.score(keys, base, lane)
            with T.If((number + 1) * keys.count > tile.seen_by_all()), T.Then():
                state.mask(number * keys.count + lane % 4 * 2, tile.limits)
            state.weigh(scale)
            state.add(keys, base, lane)
            barrier()  # and is not read any more
        state.finish(tile, of.out, of.lse, scale)


class _Tile:
    """A block's rows from `first` on, of a sequence's `tokens` from `begin` on, and the two of a lane."""

    def __init__(
        self,
        shape: AttentionShape,
        begin: Expr,
        tokens: Expr,
        first: Expr,
        length: Expr,
        causal: Expr,
        head: Expr,
        lane: Expr,
        warp: Expr,
    ) -> None:
        self.shape, self.begin, self.head, self.t = shape, begin, head, T.bind(lane % 4)
        self._tokens, self._first, self._length, self._causal = tokens, first, length, causal
        self.count = T.bind(tokens * shape.group)
        self.rows = [kept(first + warp * _ROWS + lane // 4 + half * 8) for half in range(2)]
        self.limits = [kept(self._limit(row)) for row in self.rows]

    def _limit(self, row: Expr) -> Expr:
        """Positions that a row sees."""
        token = tirx.truncdiv(row, self.shape.group)
        return tirx.Select(self._causal != 0, self._length - self._tokens + token + 1, self._length)

    def seen(self) -> Expr:
        """Positions that any row sees; none where the block has no rows."""
        last = self._limit(tirx.min(self._first + (_TILE - 1), self.count - 1))
        return tirx.Select(self._first < self.count, tirx.max(last, 0), 0)

    def seen_by_all(self) -> Expr:
        """Positions that every row sees."""
        return self._limit(self._first)

    def token(self, row: Expr) -> Expr:
        return self.begin + tirx.truncdiv(row, self.shape.group)

    def query_head(self, row: Expr) -> Expr:
        return self.head * self.shape.group + tirx.truncmod(row, self.shape.group)

    def load(self, q: Buffer, operands: Buffer) -> None:
        """Queries as A: of rows behind the end the last one's."""
        places = [tirx.min(row, self.count - 1) for row in self.rows]
        places = [(kept(self.token(row)), kept(self.query_head(row))) for row in places]
        pairs = local(8, "float16")
        for step in range(self.shape.head_dim // 16):
            for number in range(4):
                token, head = places[number % 2]
                element = step * 16 + number // 2 * 8 + self.t * 2
                T.buffer_store(pairs, q[token, head, ramp(element, 2)], [ramp(number * 2, 2)])
            call("awq_words_f16", pointer(operands, step * 4), pointer(pairs, 0))


class _Keys:
    """Tiles of keys and values in shared memory: two stages of keys (count, D + 8) and as many values.

    A row is longer than its elements, so that `ldmatrix` reads the same piece of eight rows from different banks.
    """

    def __init__(
        self, shape: AttentionShape, source: Ragged | Pages, i: Expr, length: Expr, head: Expr, thread: Expr
    ) -> None:
        self._shape, self._source, self._i, self._length, self._head = shape, source, i, length, head
        self.count: Final = 64 if shape.head_dim <= 128 else 32
        self.row: Final = shape.head_dim + _PIECE
        self.size: Final = 2 * self.count * self.row
        self.memory = T.alloc_buffer((2 * self.size,), "float16", scope="shared.dyn")
        pieces, threads = shape.head_dim // _PIECE, 32 * _WARPS
        total = self.count * pieces
        self._pieces = []  # (row, first element, whether every thread has one, whether this one does)
        for start in range(0, total, threads):
            at = start + thread
            inside = tirx.min(at, total - 1)
            row, element = kept(tirx.truncdiv(inside, pieces)), kept(tirx.truncmod(inside, pieces) * _PIECE)
            self._pieces.append((row, element, start + threads <= total, at < total))
        self._entries = Registers(len(self._pieces), "int32")

    def _position(self, number: Expr, row: Expr) -> Expr:
        """Of a tile's row: memory behind the last position may hold anything, even NaN."""
        return tirx.min(number * self.count + row, self._length - 1)

    def prepare(self, number: Expr) -> None:
        """Reads where the next tile to be loaded lies."""
        for piece, (row, *_) in enumerate(self._pieces):
            self._entries[piece] = self._source.entry(self._i, self._position(number, row))

    def load(self, number: Expr, stage: Expr) -> None:
        """Starts to copy a tile."""
        for piece, (row, element, always, mine) in enumerate(self._pieces):
            position = T.bind(self._position(number, row))
            with branch(mine, always=always):
                for part in range(2):
                    place = self._source.address(self._entries[piece], position, self._head, element, part)
                    to = stage * self.size + (part * self.count + row) * self.row + element
                    call("awq_cp_async_16", pointer(self.memory, to), place)

    def operands(self, base: Expr, lane: Expr, first: int, element: int, into: Buffer, *, values: bool) -> None:
        """B of two instructions, from 16 positions from `first` on and 16 elements from `element` on.

        Of keys for two groups of 8 positions, along D; of values for two groups of 8 elements, along the positions.
        """
        low, high = lane % 16 // 8, lane // 16  # which half a lane's address is of
        position, piece = (low, high) if values else (high, low)
        row = first + position * 8 + lane % 8 + (self.count if values else 0)
        at = base + row * self.row + element + piece * _PIECE
        call("awq_ldmatrix_x4_trans" if values else "awq_ldmatrix_x4", pointer(into, 0), pointer(self.memory, at))


class _State:
    """A lane's queries, scores and sums: of each product's 8 columns those of 2 t and 2 t + 1, in both rows."""

    def __init__(self, shape: AttentionShape, count: int) -> None:
        self._dim, self._count = shape.head_dim, count
        self.q = local(shape.head_dim // 16 * 4, "uint32")
        self._scores, self._sums = local(count // 8 * 4, "float32"), zeros(shape.head_dim // 8 * 4)
        self._b, self._p = local(4, "uint32"), local(8, "uint32")
        self._top, self._total = Registers(2), Registers(2)
        for half in range(2):
            self._top[half], self._total[half] = float32(LEAST), float32(0)
        self._next, self._factor = Registers(2), Registers(2)

    def _columns(self, half: int) -> list[int]:
        """Where the scores of a row lie."""
        return [group * 4 + half * 2 + column for group in range(self._count // 8) for column in range(2)]

    def score(self, keys: _Keys, base: Expr, lane: Expr) -> None:
        """scores = q·k."""
        for at in range(self._count // 8 * 4):
            T.buffer_store(self._scores, float32(0), [at])
        for step in range(self._dim // 16):
            for first in range(0, self._count, 16):
                keys.operands(base, lane, first, step * 16, self._b, values=False)
                for group in range(2):
                    _multiply(self._scores, (first // 8 + group) * 4, self.q, step * 4, self._b, group * 2)

    def mask(self, first: Expr, limits: list[Expr]) -> None:
        """Takes out what a row does not see; `first` is the lane's first position."""
        for half, limit in enumerate(limits):
            for at in self._columns(half):
                position = first + at // 4 * 8 + at % 2
                T.buffer_store(self._scores, T.Select(position < limit, self._scores[at], float32(LEAST)), [at])

    def weigh(self, scale: Expr) -> None:
        """Scores become weights, and what was summed before is scaled."""
        for half in range(2):
            self._next[half] = self._top[half]
            for at in self._columns(half):
                self._next[half] = tirx.max(self._next[half], self._scores[at])
        for distance in (1, 2):
            for half in range(2):
                self._next[half] = tirx.max(self._next[half], _of_neighbour(self._next[half], distance))
        for half in range(2):
            self._factor[half] = _exp2((self._top[half] - self._next[half]) * scale)
            self._top[half] = self._next[half]
            self._next[half] = self._next[half] * scale
            self._total[half] = self._total[half] * self._factor[half]
            for at in self._columns(half):
                T.buffer_store(self._scores, _exp2(self._scores[at] * scale - self._next[half]), [at])
                self._total[half] = self._total[half] + self._scores[at]
        for at in range(self._dim // 8 * 4):
            T.buffer_store(self._sums, self._sums[at] * self._factor[at % 4 // 2], [at])

    def add(self, keys: _Keys, base: Expr, lane: Expr) -> None:
        """sums += weights · v."""
        for first in range(0, self._count, 16):
            call("awq_two_halves_f16", pointer(self._p, 0), pointer(self._scores, first // 8 * 4))
            for element in range(0, self._dim, 16):
                keys.operands(base, lane, first, element, self._b, values=True)
                for part, group in ((part, group) for part in range(2) for group in range(2)):
                    _multiply(self._sums, (element // 8 + group) * 4, self._p, part * 4, self._b, group * 2)

    def finish(self, tile: _Tile, out: Buffer, lse: Buffer, scale: Expr) -> None:
        """Stores the rows that there are; where a row sees nothing, 0 and TVM's lowest."""
        for distance in (1, 2):
            for half in range(2):
                self._total[half] = self._total[half] + _of_neighbour(self._total[half], distance)
        for half, (row, limit) in enumerate(zip(tile.rows, tile.limits, strict=True)):
            with T.If(row < tile.count), T.Then():
                token, head = kept(tile.token(row)), kept(tile.query_head(row))
                inverse = kept(1.0 / self._total[half], "float32")
                pair = local(2, "float16")
                for group in range(self._dim // 8):
                    for column in range(2):
                        value = tirx.Select(limit > 0, self._sums[group * 4 + half * 2 + column] * inverse, float32(0))
                        T.buffer_store(pair, cast("float16", value, 1), [column])
                    T.buffer_store(out, pair[ramp(0, 2)], [token, head, ramp(group * 8 + tile.t * 2, 2)])
                with T.If(tile.t == 0), T.Then():
                    found = self._top[half] * scale + tirx.log2(self._total[half])
                    T.buffer_store(lse, tirx.Select(limit > 0, found, float32(LOWEST)), [token, head])


def _exp2(value: Expr) -> Expr:
    """2^value in one instruction, 0 below 2^-126."""
    return tirx.call_extern("float32", "awq_exp2", value)


def _of_neighbour(value: Expr, distance: int) -> Expr:
    """The value of the lane whose number differs in one bit."""
    mask = tirx.const(0xFFFFFFFF, "uint32")
    return tirx.call_intrin("float32", "tirx.tvm_warp_shuffle_xor", mask, value, distance, 32, 32)


def _multiply(sums: Buffer, at: int, a: Buffer, a_at: int, b: Buffer, b_at: int) -> None:
    operands = ((sums, at), (a, a_at), (b, b_at))
    call("awq_mma_m16n8k16_f16f32", *(pointer(*operand) for operand in operands))
