"""Attention of one new token per sequence over a paged KV cache on a GPU, with the signature of TVM's kernel.

A step of decoding has too few heads to fill a GPU, so the positions of a sequence are shared by several blocks
("flash decoding", Dao, Haziza, Massa, Sizov 2023). With s = q·k * scale * log2(e), base 2 throughout:

    each chunk:    m = max s,  p = 2^(s - m),  l = sum p,  o = sum p v
    each sequence: M = max m,  L = sum 2^(m - M) l,  out = sum 2^(m - M) o / L,  lse = M + log2 L

The first kernel has a block for every chunk and key/value head, or part of its query heads: k and v are read once for
all of them. A thread of (key_threads, rows) takes part of a key for the scores, and one vector of the head for the
values, whose first loads are under way before the scores are known. The second is `merge_chunks`. Which sequence a
chunk is of, `attention.sequence_at` says: no block has to add up the chunks before its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.attention import (
    LEAST,
    AttentionShape,
    Call,
    Pages,
    attention_function,
    decode_call,
    float32,
    sequence_at,
)
from awq_compile.kernels.decode_plan import DecodePlan
from awq_compile.kernels.merge_chunks import Partial, merge_chunks
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import Registers, barrier, branch, kept, load_vectors, sum_over_threads, workspace
from awq_compile.schedules import DecodeAttentionSchedule

Expr = Any
Buffer = Any


def paged_decode(shape: AttentionShape, schedule: DecodeAttentionSchedule, name: str) -> Any:
    """The PrimFunc: q (b, Hq, D) against pages (P, 2, Hkv, page, D) → out (b, Hq, D), lse (b, Hq).

    The rotary arguments are ignored: TVM's runtime rotates within attention in caches with a sliding window only, and
    those call another kernel.
    """
    plan = DecodePlan.of(shape, schedule)
    with attention_function(name) as builder:
        call, source = decode_call(shape)
        used = source.values.shape[0]
        per_chunk = T.bind(plan.pages_of_chunk(used))
        slots = T.bind(tirx.floordiv(used, per_chunk) + call.b)  # no sequence has a chunk beyond
        partial = Partial(shape, workspace("partial", (plan.workspace_floats(slots),), "float32"))
        with (
            T.launch_thread("blockIdx.x", slots) as slot,
            T.launch_thread("blockIdx.y", plan.blocks_of_chunk) as by,
            T.launch_thread("threadIdx.x", plan.key_threads) as tx,
            T.launch_thread("threadIdx.y", plan.key_rows) as ty,
        ):
            _Chunk(plan, call, source, partial, slot, by, tx, ty).emit(per_chunk)
        merge_chunks(partial, call, source.indptr, per_chunk, schedule.threads)
    return builder.get()


def _shared(count: int) -> Buffer:
    return T.alloc_buffer((count,), "float32", scope="shared")


@dataclass(frozen=True)
class _Chunk:
    """The first kernel: a block for chunk `slot` and part `by` of the query heads."""

    plan: DecodePlan
    call: Call
    source: Pages
    partial: Partial
    slot: Expr
    by: Expr
    tx: Expr
    ty: Expr

    def emit(self, per_chunk: Expr) -> None:
        """Where there is no such chunk, there are no positions: all threads meet at the barriers nevertheless."""
        page, source, slot = self.plan.shape.page, self.source, self.slot
        i = sequence_at(slot, source.indptr, self.call.b, scale=1, per_place=per_chunk)
        begin = kept(source.indptr[i])
        chunk = kept(slot - i - tirx.truncdiv(begin, per_chunk))
        length = kept(source.length(i) - chunk * per_chunk * page)
        positions = kept(tirx.min(length, per_chunk * page))
        first_page = kept(begin + chunk * per_chunk)
        self._attend(i, first_page, positions)

    def _attend(self, i: Expr, first_page: Expr, positions: Expr) -> None:
        plan, shape = self.plan, self.plan.shape
        group, dim, threads = plan.group, shape.head_dim, plan.schedule.threads
        flat = kept(self.ty * plan.key_threads + self.tx)
        head = kept(tirx.floordiv(self.by, plan.parts))
        first_head = kept(head * shape.group + tirx.floormod(self.by, plan.parts) * group)
        page_of = _PageOf(self.source, first_page, positions, head)
        values = _Values(plan, page_of, flat)
        keys = _Keys(plan, page_of, self.tx, self.ty)
        queries, scores, weights = _shared(group * dim), _shared(plan.scores * group), _shared(plan.scores * group)
        with T.If(positions > 0), T.Then():
            keys.load(0)
            values.load(0)
        scale = kept(self.call.sm_scale * math.log2(math.e), "float32")
        for start in range(0, group * dim, threads):
            at = start + flat
            with branch(at < group * dim, always=start + threads <= group * dim):
                query = cast("float32", self.call.q[i, first_head + at // dim, at % dim], 1)
                T.buffer_store(queries, query * scale, [at])
        barrier()
        highest, top = _shared(group * plan.key_rows), _shared(group)
        keys.scores(queries, scores, highest, positions)
        barrier()
        _weigh(plan, scores, highest, weights, top, flat, positions)
        barrier()
        values.add_up(weights, positions)
        values.store(self.partial, self.slot, first_head, top)


@dataclass(frozen=True)
class _PageOf:
    """Where a chunk's positions lie; those beyond its end are the last one's: their memory may hold anything."""

    source: Pages
    first_page: Expr
    positions: Expr
    head: Expr

    def places(self, positions: list[Expr]) -> list[tuple[Expr, Expr]]:
        """`Pages.place` of each. All page numbers are asked for before the first load needs one."""
        found = []
        for position in positions:
            p = kept(tirx.min(position, self.positions - 1))
            page, within = self.source.place(self.source.page(self.first_page, p), p)
            found.append((kept(page, "int64"), within))
        return found

    def load(self, part: int, place: tuple[Expr, Expr], column: Expr, into: Buffer, first: int, lanes: int) -> None:
        """`lanes` elements from `column` on, of the key (part 0) or value (1) at a place."""
        page, within = place
        loaded = self.source.memory[page, part, self.head, within, ramp(column, lanes)]
        T.buffer_store(into, loaded, [ramp(first, lanes)])


class _Keys:
    """A thread's part of the keys of its row: vectors tx, tx + key_threads, … of each."""

    def __init__(self, plan: DecodePlan, page_of: _PageOf, tx: Expr, ty: Expr) -> None:
        self.plan, self.page_of, self.tx, self.ty = plan, page_of, tx, ty
        self.count = plan.schedule.keys
        self.loaded = T.alloc_buffer((self.count * plan.key_vectors * plan.lanes,), plan.shape.dtype, scope="local")

    def _column(self, vector: int) -> Expr:
        return (vector * self.plan.key_threads + self.tx) * self.plan.lanes

    def _position(self, step: Expr, key: int) -> Expr:
        return (step * self.count + key) * self.plan.key_rows + self.ty

    def load(self, step: Expr) -> None:
        """The keys of a step that has any; of rows behind the end the last key."""
        plan = self.plan
        for key, place in enumerate(self.page_of.places([self._position(step, key) for key in range(self.count)])):
            for vector in range(plan.key_vectors):
                first = (key * plan.key_vectors + vector) * plan.lanes
                self.page_of.load(0, place, self._column(vector), self.loaded, first, plan.lanes)

    def scores(self, queries: Buffer, scores: Buffer, highest: Buffer, positions: Expr) -> None:
        """scores[position, head], and of each row of threads the highest[head, row]."""
        plan, group = self.plan, self.plan.group
        at_once = self.count * plan.key_rows
        steps = T.bind(tirx.floordiv(positions + (at_once - 1), at_once))
        mine = group if plan.shuffles else -(-group // plan.key_threads)  # heads whose scores the thread writes
        tops = Registers(mine)
        for n in range(mine):
            tops[n] = float32(LEAST)
        exchange = None if plan.shuffles else _shared(group * plan.schedule.threads)
        sums = Registers(self.count * group)
        with T.serial(0, steps) as step:
            self._dots(queries, sums)
            self._reduced(sums, exchange, scores, tops, step, positions)
            with T.If(step + 1 < steps), T.Then():
                self.load(step + 1)
        for n in range(mine):
            head = n if plan.shuffles else n * plan.key_threads + self.tx
            last = plan.shuffles or (n + 1) * plan.key_threads <= group
            writes = self.tx == 0 if plan.shuffles else head < group
            with branch(writes, always=plan.key_threads == 1 if plan.shuffles else last):
                T.buffer_store(highest, tops[n], [head * plan.key_rows + self.ty])

    def _dots(self, queries: Buffer, sums: Registers) -> None:
        """The thread's part of q·k: queries are read once for all its keys."""
        plan = self.plan
        query = Registers(plan.lanes)
        for n in range(self.count * plan.group):
            sums[n] = float32(0)
        for vector in range(plan.key_vectors):
            for g in range(plan.group):
                start = g * plan.shape.head_dim + self._column(vector)
                found = load_vectors(lambda at: queries[at], start, plan.lanes, math.gcd(plan.lanes, 4))
                for e, element in enumerate(found):
                    query[e] = element
                for key in range(self.count):
                    first = (key * plan.key_vectors + vector) * plan.lanes
                    for e in range(plan.lanes):
                        product = query[e] * cast("float32", self.loaded[first + e], 1)
                        sums[key * plan.group + g] = sums[key * plan.group + g] + product

    def _reduced(
        self, sums: Registers, exchange: Buffer | None, scores: Buffer, tops: Registers, step: Expr, positions: Expr
    ) -> None:
        """Adds up over the threads of a key, and keeps the score where the position is one."""
        plan, group = self.plan, self.plan.group

        def keep(key: int, head: Expr, place: int, value: Expr) -> None:
            position = self._position(step, key)
            with T.If(position < positions), T.Then():
                T.buffer_store(scores, value, [position * group + head])
                tops[place] = tirx.max(tops[place], value)

        if exchange is None:
            every = [sums[n] for n in range(self.count * group)]
            totals = sum_over_threads(every, self.tx, plan.key_threads, plan.schedule.subgroup)
            with branch(self.tx == 0, always=plan.key_threads == 1):
                for key in range(self.count):
                    for g in range(group):
                        keep(key, g, g, totals[key * group + g])
            return
        threads = plan.schedule.threads
        row = self.ty * plan.key_threads
        total = Registers(1)
        for key in range(self.count):
            for g in range(group):
                T.buffer_store(exchange, sums[key * group + g], [g * threads + row + self.tx])
            barrier()
            for place, first in enumerate(range(0, group, plan.key_threads)):
                head = first + self.tx
                with branch(head < group, always=first + plan.key_threads <= group):
                    total[0] = exchange[head * threads + row]
                    for other in range(1, plan.key_threads):
                        total[0] = total[0] + exchange[head * threads + row + other]
                    keep(key, head, place, total[0])
            barrier()


def _weigh(
    plan: DecodePlan, scores: Buffer, highest: Buffer, weights: Buffer, top: Buffer, flat: Expr, positions: Expr
) -> None:
    """Weights p of all scores, 0 behind the end, and the highest score of each head into `top`.

    Not in place of the scores: TVM would put a barrier between a thread's own reads and writes.
    """
    group, rows = plan.group, plan.key_rows
    each = plan.schedule.threads // group  # threads of a head
    head, first = kept(tirx.floordiv(flat, each)), kept(tirx.floormod(flat, each))
    whole = T.bind(tirx.floordiv(positions + (plan.value_rows - 1), plan.value_rows) * plan.value_rows)
    with branch(head < group, always=each * group == plan.schedule.threads):
        m = Registers(1)
        m[0] = float32(LEAST)
        lanes = math.gcd(rows, 4)
        with T.serial(0, rows // lanes) as r:
            for value in load_vectors(lambda at: highest[at], head * rows + r * lanes, lanes, lanes):
                m[0] = tirx.max(m[0], value)
        with T.If(first == 0), T.Then():
            T.buffer_store(top, m[0], [head])
        with T.serial(0, tirx.floordiv(whole - first + (each - 1), each)) as step:
            position = T.bind(first + step * each)
            at = position * group + head
            weight = tirx.if_then_else(position < positions, tirx.exp2(scores[at] - m[0]), float32(0))
            T.buffer_store(weights, weight, [at])


class _Values:
    """A thread's vector of the values of its rows, and what they add up to for each query head."""

    def __init__(self, plan: DecodePlan, page_of: _PageOf, flat: Expr) -> None:
        self.plan, self.page_of, self.flat = plan, page_of, flat
        self.count = plan.schedule.values
        # A register and its multiple: TVM reads a vector at once where it sees that the place is aligned.
        self.column = kept(tirx.floormod(flat, plan.columns)) * plan.lanes
        spare = plan.schedule.threads % plan.columns
        row = tirx.floordiv(flat, plan.columns)
        self.row = kept(tirx.min(row, plan.value_rows - 1) if spare else row)
        self.loaded = T.alloc_buffer((self.count * plan.lanes,), plan.shape.dtype, scope="local")
        self.sums, self.weights = Registers(plan.group * plan.lanes), Registers(plan.group)

    def _first(self, step: Expr, n: int) -> Expr:
        """Position of the block's first row."""
        return (step * self.count + n) * self.plan.value_rows

    def load(self, step: Expr) -> None:
        """The values of a step that has any. Rows that begin behind the end are left out."""
        lanes, positions = self.plan.lanes, self.page_of.positions
        firsts = [self._first(step, n) for n in range(self.count)]
        for n, place in enumerate(self.page_of.places([first + self.row for first in firsts])):
            with branch(firsts[n] < positions, always=n == 0):
                self.page_of.load(1, place, self.column, self.loaded, n * lanes, lanes)

    def add_up(self, weights: Buffer, positions: Expr) -> None:
        """Sums of weights and of weighted values."""
        plan, group, lanes = self.plan, self.plan.group, self.plan.lanes
        for n in range(group * lanes):
            self.sums[n] = float32(0)
        for n in range(group):
            self.weights[n] = float32(0)
        weight = Registers(group)
        at_once = self.count * plan.value_rows
        steps = T.bind(tirx.floordiv(positions + (at_once - 1), at_once))
        with T.serial(0, steps) as step:
            for n in range(self.count):
                first = self._first(step, n)
                with branch(first < positions, always=n == 0):
                    start = (first + self.row) * group
                    found = load_vectors(lambda at: weights[at], start, group, math.gcd(group, 4))
                    for g, value in enumerate(found):
                        weight[g] = value
                    for g in range(group):
                        self.weights[g] = self.weights[g] + weight[g]
                        for e in range(lanes):
                            product = weight[g] * cast("float32", self.loaded[n * lanes + e], 1)
                            self.sums[g * lanes + e] = self.sums[g * lanes + e] + product
            with T.If(step + 1 < steps), T.Then():
                self.load(step + 1)

    def store(self, partial: Partial, slot: Expr, first_head: Expr, top: Buffer) -> None:
        """Adds up over the rows of threads, a few heads at a time, and writes o, m and l."""
        plan, group, lanes = self.plan, self.plan.group, self.plan.lanes
        dim, rows, threads = plan.shape.head_dim, plan.value_rows, plan.schedule.threads
        positions = self.page_of.positions
        every = threads % plan.columns == 0
        sums, weights = _shared(plan.together * rows * dim), _shared(group * rows)
        total = Registers(1)
        wide = math.gcd(lanes, 4)
        for head in range(0, group, plan.together):
            heads = min(plan.together, group - head)
            if head:
                barrier()
            with branch(self.flat < rows * plan.columns, always=every):
                for g in range(heads):
                    for e in range(0, lanes, wide):
                        found = self.sums.vector((head + g) * lanes + e, wide)
                        start = (g * rows + self.row) * dim + self.column + e
                        T.buffer_store(sums, found, [ramp(start, wide)])
                if not head:
                    with T.If(self.column == 0), T.Then():
                        for g in range(group):
                            T.buffer_store(weights, self.weights[g], [g * rows + self.row])
            barrier()
            for start in range(0, heads * dim, threads):
                at = start + self.flat
                with T.If(tirx.all(positions > 0, at < heads * dim)), T.Then():
                    g, d = at // dim, at % dim
                    total[0] = sums[g * rows * dim + d]
                    with T.serial(1, rows) as r:
                        total[0] = total[0] + sums[(g * rows + r) * dim + d]
                    T.buffer_store(partial.memory, total[0], [partial.output(slot, first_head + head + g, d)])
        with T.If(tirx.all(positions > 0, self.flat < group)), T.Then():
            total[0] = weights[self.flat * rows]
            with T.serial(1, rows) as r:
                total[0] = total[0] + weights[self.flat * rows + r]
            at = partial.state(slot, first_head + self.flat)
            T.buffer_store(partial.memory, top[self.flat], [at])
            T.buffer_store(partial.memory, total[0], [at + 1])
