"""Few rows of x: every weight is read once, decoded in registers and used for `batch` rows of x.

x is first arranged so that its vectors meet those of `RowReader` (and scaled by the powers of two that
undo masking in place), with the sum of each group beside it, since

    sum_k (q_k - z) s x_k = s (sum_k q_k x_k) - (z s) (sum_k x_k)        over one group.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import RowReader, cast, prefetch, ramp, repeat_each, row_reader, total, zeros
from awq_compile.schedules import GemvSchedule

Expr = Any
Buffer = Any


def emit_gemv(args: LinearArgs, schedule: GemvSchedule, max_rows: int) -> None:
    """Emits the kernel for M ≤ `max_rows` at the builder's current place."""
    problem = args.problem
    reader = row_reader(problem.spec, problem.k, schedule.lanes)
    batch = min(schedule.batch, max_rows)
    tiles = -(-max_rows // batch)
    arranged = T.alloc_buffer((tiles * batch, problem.k), "float32")
    groups = problem.k // problem.spec.group if isinstance(problem.spec, QuantSpec) else 1
    sums = T.alloc_buffer((tiles * batch, groups), "float32")
    rows = T.min(args.m, max_rows) if max_rows > 1 else 1
    with T.serial(0, rows) as m:
        _arrange(args, reader, arranged, sums, m)
    if max_rows > 1:  # rows of the last tile that x does not have; their results are not stored
        with T.serial(0, tiles * batch - rows) as extra:
            with T.serial(0, problem.k // reader.lanes) as i:
                T.buffer_store(arranged, zeros(reader.lanes), [rows + extra, ramp(i * reader.lanes, reader.lanes)])
            with T.serial(0, groups) as g:
                T.buffer_store(sums, tirx.const(0, "float32"), [rows + extra, g])
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = schedule.rows // 2 if pairs else schedule.rows
    ahead = schedule.prefetch * outputs
    with T.parallel(0, -(-problem.n // outputs)) as block:
        columns = [block * outputs + i for i in range(outputs)]
        if problem.n % outputs:
            columns = [T.bind(T.min(column, problem.n - 1)) for column in columns]
        weight_rows = columns + [column + problem.n for column in columns] if pairs else columns
        if tiles == 1:
            _tile(args, reader, arranged, sums, columns, weight_rows, 0, batch, ahead)
        else:
            with T.serial(0, (rows + (batch - 1)) // batch) as tile:
                _tile(args, reader, arranged, sums, columns, weight_rows, tile * batch, batch, ahead)


def _arrange(args: LinearArgs, reader: RowReader, arranged: Buffer, sums: Buffer, m: Expr) -> None:
    """Row `m` of x in the order of the reader's vectors, and the sums of its groups."""
    with T.serial(0, reader.k // reader.step) as step:
        for part in range(reader.parts):
            first, stride = reader.x_index(part)
            value = cast("float32", args.x[m, ramp(step * reader.step + first, reader.lanes, stride)], reader.lanes)
            target = ramp(step * reader.step + part * reader.lanes, reader.lanes)
            T.buffer_store(arranged, value * reader.x_scale(part), [m, target])
        for group in range(reader.groups):
            size = reader.step // reader.groups
            lanes = min(reader.lanes, 16)
            value = zeros(lanes)
            for i in range(0, size, lanes):
                start = step * reader.step + group * size + i
                value = value + cast("float32", args.x[m, ramp(start, lanes)], lanes)
            T.buffer_store(sums, total(T.bind(value), lanes), [m, step * reader.groups + group])


def _tile(
    args: LinearArgs,
    reader: RowReader,
    arranged: Buffer,
    sums: Buffer,
    columns: list[Expr],
    weight_rows: list[Expr],
    first: Expr,
    batch: int,
    ahead: int,
) -> None:
    """Products of `weight_rows` with rows first … first + batch of x, and their epilogue."""
    lanes, groups = reader.lanes, reader.groups
    cells = [(r, m) for r in range(len(weight_rows)) for m in range(batch)]
    acc = T.alloc_buffer((len(cells) * lanes,), "float32", scope="local")
    shifts = T.alloc_buffer((len(cells) * max(groups, 1),), "float32", scope="local")

    def acc_at(cell: int) -> Expr:
        return ramp(cell * lanes, lanes)

    def shift_at(cell: int) -> Expr:
        return ramp(cell * groups, groups)

    for cell in range(len(cells)):
        T.buffer_store(acc, zeros(lanes), [acc_at(cell)])
        if groups:
            T.buffer_store(shifts, zeros(groups), [shift_at(cell)])
    with T.serial(0, reader.k // reader.step) as step:
        weight = args.weight[args.codes]
        for row in weight_rows if ahead else ():
            T.evaluate(prefetch(weight, row + ahead, reader.words(step)))
        words = [reader.load(weight, row, step) for row in weight_rows]
        partial: dict[tuple[int, int], Expr] = {}
        for part in range(reader.parts):
            xs = [T.bind(arranged[first + m, ramp(step * reader.step + part * lanes, lanes)]) for m in range(batch)]
            for r in range(len(weight_rows)):
                value = T.bind(reader.values(words[r], part))
                for m in range(batch):
                    old = partial.get((r, m))
                    partial[r, m] = T.bind(value * xs[m] if old is None else old + value * xs[m])
        for r, row in enumerate(weight_rows):
            if groups:
                at = ramp(step * groups, groups)
                scale, shift = args.scale_and_shift(lambda name, row=row, at=at: args.weight[name][row, at], groups)  # type: ignore[misc]
                scale = T.bind(repeat_each(scale, groups, lanes // groups))
            for m in range(batch):
                cell = cells.index((r, m))
                value = partial[r, m]
                if groups:
                    value = value * scale
                    group_sums = sums[first + m, ramp(step * groups, groups)]
                    T.buffer_store(shifts, shifts[shift_at(cell)] + shift * group_sums, [shift_at(cell)])
                T.buffer_store(acc, acc[acc_at(cell)] + value, [acc_at(cell)])
    results = []
    for cell in range(len(cells)):
        result = total(T.bind(acc[acc_at(cell)]), lanes)
        if groups:
            result = result - total(T.bind(shifts[shift_at(cell)]), groups)
        results.append(T.bind(result))
    for m in range(batch):
        for c, column in enumerate(columns):
            value = results[cells.index((c, m))]
            gate = None
            if len(weight_rows) > len(columns):
                gate, value = value, results[cells.index((c + len(columns), m))]
            if batch == 1:
                T.buffer_store(args.y, args.finish(first, column, value, gate), [first, column])
            else:
                with T.If(first + m < args.m), T.Then():
                    T.buffer_store(args.y, args.finish(first + m, column, value, gate), [first + m, column])
