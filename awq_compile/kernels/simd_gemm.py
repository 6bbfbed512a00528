"""Many rows of x: a panel of W is decoded into the cache once, then used for `m_block` rows.

For each block of n_vectors * lanes columns, in parallel: for each block of K the panel P (k_block, columns)
is decoded from the packed rows (lanes run along rows of W, so one word vector gives up to eight rows of P),
then every register tile of m_tile rows adds its products to the sums S (m_block, columns) in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from awq_compile.formats import BLOCK, QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast, decode, ramp, zeros
from awq_compile.schedules import GemmSchedule

Expr = Any
Buffer = Any


def emit_gemm(args: LinearArgs, schedule: GemmSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem = args.problem
    pairs = problem.epilogue.activation == "silu_mul"
    schedule = schedule.fit(problem.n, pairs=pairs)
    lanes = schedule.lanes
    halves = schedule.n_vectors // 2 if pairs else schedule.n_vectors
    width, columns = schedule.n_vectors * lanes, halves * lanes
    with T.parallel(0, -(-problem.n // columns)) as block:
        panel = T.alloc_buffer((schedule.k_block, width), "float32")
        sums = T.alloc_buffer((schedule.m_block, width), "float32")
        # The last block is moved back to end at column N, so that all its vectors are whole.
        start = T.bind(T.min(block * columns, problem.n - columns) if problem.n % columns else block * columns)
        firsts = [start + v * lanes for v in range(halves)]
        weight_rows = firsts + [first + problem.n for first in firsts] if pairs else firsts
        with T.serial(0, (args.m + (schedule.m_block - 1)) // schedule.m_block) as m_outer:
            m0 = T.bind(m_outer * schedule.m_block)
            tiles = T.bind((T.min(args.m - m0, schedule.m_block) + (schedule.m_tile - 1)) // schedule.m_tile)
            with T.serial(0, tiles * schedule.m_tile) as i:
                for v in range(schedule.n_vectors):
                    T.buffer_store(sums, zeros(lanes), [i, ramp(v * lanes, lanes)])
            full, rest = divmod(problem.k, schedule.k_block)
            if full:
                with T.serial(0, full) as k_outer:
                    _k_block(
                        args,
                        schedule,
                        panel,
                        sums,
                        weight_rows,
                        m0,
                        tiles,
                        k_outer * schedule.k_block,
                        schedule.k_block,
                    )
            if rest:
                _k_block(args, schedule, panel, sums, weight_rows, m0, tiles, full * schedule.k_block, rest)
            with T.serial(0, T.min(args.m - m0, schedule.m_block)) as i:
                _store_row(args, sums, m0, i, firsts, lanes, pairs)


def _k_block(
    args: LinearArgs,
    schedule: GemmSchedule,
    panel: Buffer,
    sums: Buffer,
    weight_rows: list[Expr],
    m0: Expr,
    tiles: Expr,
    k0: Expr,
    depth: int,
) -> None:
    """Decodes rows k0 … k0 + depth of the panel and adds their products to `sums`."""
    lanes, spec = schedule.lanes, args.problem.spec
    unit = spec.group if isinstance(spec, QuantSpec) else BLOCK
    with T.serial(0, depth // unit) as group:
        for v, first in enumerate(weight_rows):
            scale = shift = None
            if isinstance(spec, QuantSpec):
                at = k0 // spec.group + group
                scale, shift = args.scale_and_shift(
                    partial(args.column, first_row=first, column=at, lanes=lanes), lanes
                )
            with T.serial(0, unit // BLOCK) as inner:
                base = T.bind(k0 + group * unit + inner * BLOCK)
                words: dict[int, Expr] = {}

                def word(i: int, base: Expr = base, first: Expr = first, words: dict[int, Expr] = words) -> Expr:
                    if i not in words:
                        at = base // BLOCK * spec.bits + i if isinstance(spec, QuantSpec) else base + i
                        words[i] = T.bind(args.column(args.codes, first, at, lanes))
                    return words[i]

                for element in range(BLOCK):
                    value = decode(spec, word, element, scale, shift, lanes)
                    T.buffer_store(panel, value, [base - k0 + element, ramp(v * lanes, lanes)])
    with T.serial(0, tiles) as tile:
        _register_tile(args, schedule, panel, sums, m0, tile, k0, depth)


def _register_tile(
    args: LinearArgs, schedule: GemmSchedule, panel: Buffer, sums: Buffer, m0: Expr, tile: Expr, k0: Expr, depth: int
) -> None:
    """sums[tile] += x[tile, k0 : k0 + depth] @ panel, with all sums in registers."""
    lanes, m_tile, vectors = schedule.lanes, schedule.m_tile, schedule.n_vectors
    acc = T.alloc_buffer((m_tile * vectors * lanes,), "float32", scope="local")
    base = T.bind(tile * m_tile)
    # Rows past M repeat the last one; their sums are never stored.
    rows = [T.bind(T.min(m0 + base + i, args.m - 1)) for i in range(m_tile)]

    def at(i: int, v: int) -> Expr:
        return ramp((i * vectors + v) * lanes, lanes)

    for i in range(m_tile):
        for v in range(vectors):
            T.buffer_store(acc, sums[base + i, ramp(v * lanes, lanes)], [at(i, v)])
    with T.serial(0, depth) as k:
        b = [T.bind(panel[k, ramp(v * lanes, lanes)]) for v in range(vectors)]
        for i in range(m_tile):
            a = T.bind(cast("float32", args.x[rows[i], k0 + k], 1))
            for v in range(vectors):
                T.buffer_store(acc, acc[at(i, v)] + b[v] * a, [at(i, v)])
    for i in range(m_tile):
        for v in range(vectors):
            T.buffer_store(sums, acc[at(i, v)], [base + i, ramp(v * lanes, lanes)])


def _store_row(args: LinearArgs, sums: Buffer, m0: Expr, i: Expr, firsts: list[Expr], lanes: int, pairs: bool) -> None:
    """Epilogue and store of one row of the block's columns."""
    for v, first in enumerate(firsts):
        gate = T.bind(sums[i, ramp(v * lanes, lanes)]) if pairs else None
        value = T.bind(sums[i, ramp((v + len(firsts) * pairs) * lanes, lanes)])
        columns = ramp(first, lanes)
        T.buffer_store(args.y, args.finish(m0 + i, columns, value, gate, lanes), [m0 + i, columns])
