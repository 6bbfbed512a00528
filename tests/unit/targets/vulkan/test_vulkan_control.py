"""Branches, loops and expressions that must not be computed, as structured control flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from helpers_vulkan import Built, executor, validate
from tvm.script import tirx as T


def run(function: Any, folder: Path, *args: Any) -> list[np.ndarray]:
    """Validates the shaders of a function, and runs it."""
    built = Built(function)
    validate(list(built.shaders.values()), folder)
    return built(executor(), *args)


def test_nested_branches_and_loops(tmp_path: Path) -> None:
    """Loops with run-time bounds and starts, branches with and without else, variables carried in local arrays."""

    @T.prim_func
    def main(a: T.Buffer((64,), "int32"), b: T.Buffer((64,), "int32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 64)
        total = T.alloc_buffer((2,), "int32", scope="local")
        total[0] = 0
        total[1] = 1
        for i in range(a[tx]):
            if i % 2 == 0:
                for j in T.serial(i, a[tx] + 1):
                    total[0] = total[0] + j * total[1]
            else:
                total[1] = total[1] + 1
                if i % 3 == 0:
                    total[0] = total[0] - 1
        b[tx] = total[0]

    def expected(n: int) -> int:
        total, factor = 0, 1
        for i in range(n):
            if i % 2 == 0:
                total += sum(range(i, n + 1)) * factor
            else:
                factor += 1
                total -= i % 3 == 0
        return total

    a = np.random.default_rng(0).integers(0, 12, 64).astype("int32")
    _, b = run(main, tmp_path, a, np.zeros_like(a))
    np.testing.assert_array_equal(b, [expected(int(n)) for n in a])


def test_while_loop(tmp_path: Path) -> None:
    """A while loop whose condition itself branches; it halves a number until it is odd or 1."""

    @T.prim_func
    def main(a: T.Buffer((64,), "int32"), b: T.Buffer((64,), "int32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 64)
        x = T.alloc_buffer((1,), "int32", scope="local")
        x[0] = a[tx]
        while T.if_then_else(x[0] > 1, a[x[0] % 64] * 0 + x[0] % 2 == 0, T.bool(False)):
            x[0] = x[0] // 2
        b[tx] = x[0]

    a = np.arange(64, dtype="int32")
    _, b = run(main, tmp_path, a, np.zeros_like(a))
    np.testing.assert_array_equal(b, [int(n) // max(1, int(n) & -int(n)) for n in a])


def test_breaks_and_continues(tmp_path: Path) -> None:
    """Leaving and repeating loops from within branches."""

    @T.prim_func
    def main(a: T.Buffer((64,), "int32"), b: T.Buffer((64,), "int32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 64)
        total = T.alloc_buffer((1,), "int32", scope="local")
        total[0] = 0
        for i in range(100):
            if i % 3 == 0:
                continue
            if total[0] > a[tx]:
                break
            total[0] = total[0] + i
        b[tx] = total[0]

    def expected(limit: int) -> int:
        total = 0
        for i in range(100):
            if i % 3 == 0:
                continue
            if total > limit:
                break
            total += i
        return total

    a = np.random.default_rng(1).integers(0, 3000, 64).astype("int32")
    _, b = run(main, tmp_path, a, np.zeros_like(a))
    np.testing.assert_array_equal(b, [expected(int(n)) for n in a])


def test_untaken_branches_do_not_read(tmp_path: Path) -> None:
    """`if_then_else`, `and` and `or` guard loads: the guarded index lies far outside the buffer."""

    @T.prim_func
    def main(a: T.Buffer((64,), "int32"), b: T.Buffer((64,), "int32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 64)
        far = T.meta_var(T.if_then_else(tx < 32, 0, 1 << 28) + tx)
        b[tx] = T.if_then_else(tx < 32, a[far], -1)
        if tx < 32 and a[far] > 5:
            b[tx] = b[tx] + 1000
        if tx >= 32 or a[far] < 3:
            b[tx] = b[tx] + 10000

    a = np.arange(64, dtype="int32")
    _, b = run(main, tmp_path, a, np.zeros_like(a))
    low = a[:32] + np.where(a[:32] > 5, 1000, 0) + np.where(a[:32] < 3, 10000, 0)
    np.testing.assert_array_equal(b, np.concatenate([low, np.full(32, 9999)]))


def test_unrolled_and_stepped_loops(tmp_path: Path) -> None:
    """Loops marked for unrolling, and loops with a step."""

    @T.prim_func
    def main(a: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 16)
        for i in T.unroll(2):
            for j in T.serial(0, 4, step=2):
                b[tx * 4 + i + j] = a[tx * 4 + i + j] * T.Cast("float32", j + 1)

    a = np.random.default_rng(2).standard_normal(64).astype("float32")
    _, b = run(main, tmp_path, a, np.zeros_like(a))
    np.testing.assert_array_equal(b, a * np.tile(np.float32([1, 1, 3, 3]), 16))


def test_blocks_and_threads_in_three_dimensions(tmp_path: Path) -> None:
    """Every axis of blocks and threads counts on its own."""

    @T.prim_func
    def main(b: T.Buffer((192,), "int32")):
        T.func_attr({"tirx.noalias": True})
        bx = T.launch_thread("blockIdx.x", 2)
        by = T.launch_thread("blockIdx.y", 2)
        bz = T.launch_thread("blockIdx.z", 2)
        tx = T.launch_thread("threadIdx.x", 4)
        ty = T.launch_thread("threadIdx.y", 3)
        tz = T.launch_thread("threadIdx.z", 2)
        place = T.meta_var(((((bz * 2 + by) * 2 + bx) * 2 + tz) * 3 + ty) * 4 + tx)
        b[place] = place * 7

    (b,) = run(main, tmp_path, np.zeros(192, "int32"))
    np.testing.assert_array_equal(b, np.arange(192) * 7)
