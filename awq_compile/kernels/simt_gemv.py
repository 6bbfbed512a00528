"""Few rows of x on a GPU: threads along K read a row of W together, and their sums meet at the end.

Block (k_threads, row_groups); every thread accumulates `rows` rows of W for `batch` rows of x over its
units of K: s (sum q x - z sum x), float32. See `simt.sum_over_threads` for the reduction.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast
from awq_compile.kernels.simt import Registers, ThreadReader, load_vectors, sum_over_threads
from awq_compile.schedules import SimtGemvSchedule

Expr = Any
Buffer = Any


def emit_simt_gemv(args: LinearArgs, schedule: SimtGemvSchedule, max_rows: int) -> None:
    """Emits the kernel for M ≤ `max_rows` at the builder's current place."""
    problem = args.problem
    batch = min(schedule.batch, max_rows)
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = max(schedule.rows // 2, 1) if pairs else schedule.rows
    per_block = outputs * schedule.row_groups
    reader = ThreadReader(problem.spec, schedule.unit, schedule.magic, schedule.in_place)
    units = problem.k // schedule.unit
    tiles = -(-max_rows // batch)
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // per_block)) as bx,
        T.launch_thread("blockIdx.y", tiles if tiles == 1 else (args.m + (batch - 1)) // batch) as by,
        T.launch_thread("threadIdx.x", schedule.k_threads) as tx,
        T.launch_thread("threadIdx.y", schedule.row_groups) as ty,
    ):
        first = T.bind((bx * schedule.row_groups + ty) * outputs)
        columns = [first + i for i in range(outputs)]
        if problem.n % per_block:
            columns = [T.bind(T.min(column, problem.n - 1)) for column in columns]
        weight_rows = columns + [column + problem.n for column in columns] if pairs else columns
        rows = [_row(args, by, m, batch, max_rows) for m in range(batch)]
        acc = T.alloc_buffer((len(weight_rows) * batch,), "float32", scope="local")
        for i in range(len(weight_rows) * batch):
            T.buffer_store(acc, tirx.const(0, "float32"), [i])

        def step(unit: Expr) -> None:
            _accumulate(args, reader, acc, unit, weight_rows, rows)

        with T.serial(0, units // schedule.k_threads) as i:
            step(i * schedule.k_threads + tx)
        if rest := units % schedule.k_threads:
            with T.If(tx < rest), T.Then():
                step(units - rest + tx)
        values = [T.bind(acc[i]) for i in range(len(weight_rows) * batch)]
        sums = sum_over_threads(values, tx, schedule.k_threads, schedule.subgroup)
        for m in range(batch):
            for c in range(outputs):
                value = sums[c * batch + m]
                gate = None
                if pairs:
                    gate, value = value, sums[(c + outputs) * batch + m]
                inside = tx == 0
                if problem.n % per_block:
                    inside = tirx.all(inside, first + c < problem.n)
                if max_rows > 1:
                    inside = tirx.all(inside, by * batch + m < args.m32)
                with T.If(inside), T.Then():
                    row = by * batch + m if max_rows > 1 else 0
                    T.buffer_store(args.y, args.finish(row, first + c, value, gate), [row, first + c])


def _row(args: LinearArgs, by: Expr, m: int, batch: int, max_rows: int) -> Expr:
    """Row of x, the last one repeated past M; its results are not stored."""
    return 0 if max_rows == 1 else T.bind(T.min(by * batch + m, args.m32 - 1))


def _accumulate(
    args: LinearArgs, reader: ThreadReader, acc: Buffer, unit: Expr, weight_rows: list[Expr], rows: list[Expr]
) -> None:
    """acc[row, m] += s (sum q x - z sum x) over one unit of K."""
    spec, batch, size = reader.spec, len(rows), reader.unit
    start = unit * size
    xs = [Registers(size) for _ in rows]
    for m, row in enumerate(rows):
        loaded = load_vectors(lambda at, row=row: args.x[row, at], start, size, 4)  # type: ignore[misc]
        for element, x in enumerate(loaded):
            xs[m][element] = cast("float32", x, 1)
    totals = Registers(batch)
    if isinstance(spec, QuantSpec):
        for m in range(batch):
            totals[m] = xs[m][0]
            for element in range(1, size):
                totals[m] = totals[m] + xs[m][element]
    for m, element in product(range(batch), range(size)):
        if place := reader.place(element):
            xs[m][element] = xs[m][element] * 2.0**-place
    parts, decoded = Registers(batch), Registers(1)
    for r, row in enumerate(weight_rows):
        words = reader.load(lambda at, row=row: args.weight[args.codes][row, at], unit)  # type: ignore[misc]
        for element in range(size):
            decoded[0] = reader.value(words, element)
            for m in range(batch):
                term = decoded[0] * xs[m][element]
                parts[m] = parts[m] + term if element else term
        if isinstance(spec, QuantSpec):
            group = start // spec.group
            scale, shift = args.scale_and_shift(lambda name, row=row, g=group: args.weight[name][row, g], 1)  # type: ignore[misc]
            for m in range(batch):
                parts[m] = parts[m] * scale - shift * totals[m]
        for m in range(batch):
            at = r * batch + m
            T.buffer_store(acc, acc[at] + parts[m], [at])
