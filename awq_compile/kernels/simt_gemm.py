"""Many rows of x on a GPU without matrix units: tiles of x and decoded W in shared memory, tiles of y in registers.

Block tile (block_m, block_n), thread tile (thread_m, thread_n), `block_k` deep. A thread's columns lie
block_n / thread_n apart, so that neighbouring threads read neighbouring columns of the shared tile; with
`silu_mul` the left half of a block's columns are gates and the right half their ups.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast
from awq_compile.kernels.simt import Registers, ThreadReader, barrier, load_vectors
from awq_compile.schedules import SimtGemmSchedule

Expr = Any
Buffer = Any


def emit_simt_gemm(args: LinearArgs, schedule: SimtGemmSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = s.block_n // 2 if pairs else s.block_n
    threads = s.threads
    x_threads = s.block_n // s.thread_n
    zero = tirx.const(0, "float32")
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // outputs)) as bx,
        T.launch_thread("blockIdx.y", (args.m32 + (s.block_m - 1)) // s.block_m) as by,
        T.launch_thread("threadIdx.x", threads) as t,
    ):
        tiles_x = T.alloc_buffer((s.block_k * s.block_m,), s.shared, scope="shared")
        tiles_w = T.alloc_buffer((s.block_k * s.block_n,), s.shared, scope="shared")
        acc = T.alloc_buffer((s.thread_m * s.thread_n,), "float32", scope="local")
        for i in range(s.thread_m * s.thread_n):
            T.buffer_store(acc, zero, [i])
        tn, tm = T.bind(t % x_threads), T.bind(t // x_threads)
        with T.serial(0, problem.k // s.block_k) as step:
            k0 = T.bind(step * s.block_k)
            _stage_x(args, s, tiles_x, by, k0, t)
            _stage_w(args, s, tiles_w, bx, k0, t, pairs)
            barrier()
            with T.serial(0, s.block_k) as k:
                a, b = Registers(s.thread_m), Registers(s.thread_n)
                for i in range(s.thread_m):
                    a[i] = cast("float32", tiles_x[k * s.block_m + tm * s.thread_m + i], 1)
                for j in range(s.thread_n):
                    b[j] = cast("float32", tiles_w[k * s.block_n + j * x_threads + tn], 1)
                for i in range(s.thread_m):
                    for j in range(s.thread_n):
                        at = i * s.thread_n + j
                        T.buffer_store(acc, acc[at] + a[i] * b[j], [at])
            barrier()
        for i in range(s.thread_m):
            row = T.bind(by * s.block_m + tm * s.thread_m + i)
            for j in range(s.thread_n // 2 if pairs else s.thread_n):
                column = bx * outputs + j * x_threads + tn
                value, gate = acc[i * s.thread_n + j], None
                if pairs:
                    gate, value = value, acc[i * s.thread_n + j + s.thread_n // 2]
                inside = row < args.m32
                if problem.n % outputs:
                    inside = tirx.all(inside, column < problem.n)
                with T.If(inside), T.Then():
                    T.buffer_store(args.y, args.finish(row, column, value, gate), [row, column])


def _stage_x(args: LinearArgs, s: SimtGemmSchedule, tile: Buffer, by: Expr, k0: Expr, t: Expr) -> None:
    """tile[k, m] = x[m, k0 + k], four elements of a row at a time; rows past M repeat the last."""
    quads = s.block_m * s.block_k // 4
    for i in range(-(-quads // s.threads)):
        quad = T.bind(i * s.threads + t)

        def copy(quad: Expr) -> None:
            m, k = T.bind(quad // (s.block_k // 4)), T.bind(quad % (s.block_k // 4) * 4)
            row = T.bind(T.min(by * s.block_m + m, args.m32 - 1))
            loaded = load_vectors(lambda at: args.x[row, at], k0 + k, 4, 4)
            for j, value in enumerate(loaded):
                T.buffer_store(tile, _as(s.shared, args.problem.dtype, value), [(k + j) * s.block_m + m])

        if (i + 1) * s.threads > quads:
            with T.If(quad < quads), T.Then():
                copy(quad)
        else:
            copy(quad)


def _stage_w(args: LinearArgs, s: SimtGemmSchedule, tile: Buffer, bx: Expr, k0: Expr, t: Expr, pairs: bool) -> None:
    """tile[k, n] = decoded W[n, k0 + k], one unit of a row at a time; columns past N repeat the last."""
    problem, spec = args.problem, args.problem.spec
    reader = ThreadReader(spec, s.unit, s.magic)
    per_row = s.block_k // s.unit
    units = s.block_n * per_row
    outputs = s.block_n // 2 if pairs else s.block_n
    for i in range(-(-units // s.threads)):
        index = T.bind(i * s.threads + t)

        def decode(index: Expr) -> None:
            n, unit = (T.bind(part) for part in reader.split(index, s.block_n, per_row))
            column = bx * outputs + (n % outputs if pairs else n)
            if problem.n % outputs:
                column = T.min(column, problem.n - 1)
            row = T.bind(column + n // outputs * problem.n if pairs else column)
            words = reader.load(lambda at: args.stored(args.codes, row, at), k0 // s.unit + unit)
            scale = shift = None
            if isinstance(spec, QuantSpec):
                group = (k0 + unit * s.unit) // spec.group
                scale, shift = args.scale_and_shift(lambda name: args.stored(name, row, group), 1)
            for element in range(s.unit):
                value = reader.value(words, element)
                if scale is not None:
                    value = value * scale - shift
                T.buffer_store(tile, _as(s.shared, "float32", value), [(unit * s.unit + element) * s.block_n + n])

        if (i + 1) * s.threads > units:
            with T.If(index < units), T.Then():
                decode(index)
        else:
            decode(index)


def _as(dtype: str, have: str, value: Expr) -> Expr:
    """`value` as `dtype`, without a conversion where it has that type."""
    return value if dtype == have else cast(dtype, value, 1)
