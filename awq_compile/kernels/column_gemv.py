"""Few rows of x on a GPU, weights in KN: neighbouring threads compute neighbouring outputs.

Block (n_threads, k_threads): threads along x each own `columns` neighbouring outputs and read them by one
vector load per word; threads along y share K, and their sums meet in shared memory. All threads of a row of
the block read the same x.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import Registers, ThreadReader, barrier, lanes_of, load_vectors
from awq_compile.schedules import ColumnGemvSchedule

Expr = Any
Buffer = Any


def emit_column_gemv(args: LinearArgs, schedule: ColumnGemvSchedule, max_rows: int) -> None:
    """Emits the kernel for M ≤ `max_rows` at the builder's current place."""
    problem, s = args.problem, schedule.fit(args.problem.n)
    batch = min(s.batch, max_rows)
    pairs = problem.epilogue.activation == "silu_mul"
    reader = ThreadReader(problem.spec, s.unit, s.magic)
    units, tiles = problem.k // s.unit, -(-max_rows // batch)
    per_block = s.n_threads * s.columns
    count = s.columns * batch * (2 if pairs else 1)
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // per_block)) as bx,
        T.launch_thread("blockIdx.y", tiles if tiles == 1 else (args.m32 + (batch - 1)) // batch) as by,
        T.launch_thread("threadIdx.x", s.n_threads) as tx,
        T.launch_thread("threadIdx.y", s.k_threads) as ty,
    ):
        first = T.bind((bx * s.n_threads + tx) * s.columns)
        read = first if problem.n % per_block == 0 else T.bind(T.min(first, problem.n - s.columns))
        rows = [0 if max_rows == 1 else T.bind(T.min(by * batch + m, args.m32 - 1)) for m in range(batch)]
        acc = T.alloc_buffer((count,), "float32", scope="local")
        for i in range(count):
            T.buffer_store(acc, tirx.const(0, "float32"), [i])
        starts = [read, T.bind(read + problem.n)] if pairs else [read]

        def step(unit: Expr) -> None:
            _accumulate(args, reader, acc, unit, starts, s.columns, rows)

        with T.serial(0, units // s.k_threads) as i:
            step(i * s.k_threads + ty)
        if rest := units % s.k_threads:
            with T.If(ty < rest), T.Then():
                step(units - rest + ty)
        sums = _sum_over_y(acc, count, s, tx, ty)
        for m in range(batch):
            for c in range(s.columns):
                value, gate = sums[c * batch + m], None
                if pairs:
                    gate, value = value, sums[(c + s.columns) * batch + m]
                inside = ty == 0
                if problem.n % per_block:
                    inside = tirx.all(inside, first < problem.n)
                row = by * batch + m
                if max_rows > 1:
                    inside = tirx.all(inside, row < args.m32)
                with T.If(inside), T.Then():
                    place = 0 if max_rows == 1 else row
                    T.buffer_store(args.y, args.finish(place, first + c, value, gate), [place, first + c])


def _accumulate(
    args: LinearArgs, reader: ThreadReader, acc: Buffer, unit: Expr, starts: list[Expr], columns: int, rows: list[Expr]
) -> None:
    """acc[column, m] += s (sum q x - z sum x) over one unit of K, for `columns` outputs from each start on."""
    spec, batch, size = reader.spec, len(rows), reader.unit
    assert isinstance(spec, QuantSpec)
    start = unit * size
    xs = [Registers(size) for _ in rows]
    totals = Registers(batch)
    for m, row in enumerate(rows):
        loaded = load_vectors(lambda at, row=row: args.x[row, at], start, size, 4)  # type: ignore[misc]
        for element, x in enumerate(loaded):
            xs[m][element] = cast("float32", x, 1)
        totals[m] = xs[m][0]
        for element in range(1, size):
            totals[m] = totals[m] + xs[m][element]
    parts, decoded = Registers(batch), Registers(1)
    for half, first in enumerate(starts):
        lanes = ramp(first, columns)
        words = [
            lanes_of(T.bind(args.stored(args.codes, lanes, unit * reader.words + w)), columns)
            for w in range(reader.words)
        ]
        group = start // spec.group
        scale, shift = args.scale_and_shift(lambda name, at=lanes, g=group: args.stored(name, at, g), columns)  # type: ignore[misc]
        scales, shifts = lanes_of(scale, columns), lanes_of(shift, columns)
        for c in range(columns):
            for element in range(size):
                decoded[0] = reader.value([word[c] for word in words], element)
                for m in range(batch):
                    product = decoded[0] * xs[m][element]
                    parts[m] = parts[m] + product if element else product
            for m in range(batch):
                at = (half * columns + c) * batch + m
                T.buffer_store(acc, acc[at] + (parts[m] * scales[c] - shifts[c] * totals[m]), [at])


def _sum_over_y(acc: Buffer, count: int, s: ColumnGemvSchedule, tx: Expr, ty: Expr) -> list[Expr]:
    """Sums of `count` registers over threadIdx.y, valid in thread y = 0."""
    if s.k_threads == 1:
        return [acc[i] for i in range(count)]
    shared = T.alloc_buffer((s.k_threads * count * s.n_threads,), "float32", scope="shared")
    for i in range(count):
        T.buffer_store(shared, acc[i], [(ty * count + i) * s.n_threads + tx])
    barrier()
    with T.If(ty == 0), T.Then():
        for i in range(count):
            for y in range(1, s.k_threads):
                T.buffer_store(acc, acc[i] + shared[(y * count + i) * s.n_threads + tx], [i])
    return [acc[i] for i in range(count)]
