"""Buffers of every kind and width of access, shared memory, barriers, subgroups, and how scalars arrive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_vulkan import Built, executor, validate, vulkan_target
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I

from awq_compile.targets.vulkan.spirv.enums import Capability, Decoration, Op
from awq_compile.targets.vulkan.spirv.shader import Shader

THREADS = 32


def kernel(buffers: dict[str, tuple[int, str]], body: Callable[..., None], threads: int = THREADS) -> Any:
    """A PrimFunc of one block of threads; `body` gets the thread's index and the buffers."""
    with IRBuilder() as builder, I.prim_func():
        I.func_name("main")
        I.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        found = [I.arg(name, I.buffer((size,), dtype)) for name, (size, dtype) in buffers.items()]
        with I.launch_thread("blockIdx.x", 1), I.launch_thread("threadIdx.x", threads) as tx:
            body(tx, *found)
    return builder.get()


def decorations(shader: Shader, kind: Decoration) -> int:
    """How many ids carry a decoration."""
    return sum(op == Op.DECORATE and operands[1] == kind for op, operands in shader._instructions())


@pytest.mark.parametrize("dtype", ["uint8", "float16", "uint32", "float32", "int64"])
@pytest.mark.parametrize("lanes", [2, 3, 4, 8, 16])
def test_vectors(dtype: str, lanes: int) -> None:
    """Contiguous, strided and gathered vectors of any width load, compute and store."""

    def body(tx: Any, a: Any, b: Any, c: Any) -> None:
        contiguous = a[I.ramp(tx * lanes, 1, lanes)]
        I.buffer_store(b, contiguous + contiguous, [I.ramp(tx * lanes, 1, lanes)])
        strided = a[I.ramp(tx, THREADS, lanes)]
        I.buffer_store(c, strided, [I.ramp(tx * lanes, 1, lanes)])

    size = THREADS * lanes
    built = Built(kernel({"a": (size, dtype), "b": (size, dtype), "c": (size, dtype)}, body))
    a = np.random.default_rng(0).integers(0, 100, size).astype(dtype)
    features = {"uint8": ("int8", "storage8"), "float16": ("float16", "storage16"), "int64": ("int64",)}
    _, b, c = built(executor(*features.get(dtype, ())), a, np.zeros_like(a), np.zeros_like(a))
    np.testing.assert_array_equal(b, a + a)
    np.testing.assert_array_equal(c, a.reshape(lanes, THREADS).T.reshape(-1))


def test_aligned_vectors_are_one_access() -> None:
    """A buffer read as vectors of 4 and as scalars is declared twice at one binding, both marked Aliased."""

    def body(tx: Any, a: Any, b: Any) -> None:
        I.buffer_store(b, a[I.ramp(tx * 4, 1, 4)] + tirx.Broadcast(a[tx], 4), [I.ramp(tx * 4, 1, 4)])

    built = Built(kernel({"a": (128, "uint32"), "b": (128, "uint32")}, body))
    (shader,) = built.shaders.values()
    assert decorations(shader, Decoration.ALIASED) == 2
    assert decorations(shader, Decoration.NON_WRITABLE) == 2
    assert sum(op == Op.LOAD for op, _ in shader._instructions()) == 3, "one vector, one scalar, the thread index"
    a = np.arange(128, dtype="uint32")
    _, b = built(executor(), a, np.zeros_like(a))
    np.testing.assert_array_equal(b, a + np.repeat(a[:32], 4))


def test_unaligned_vectors_are_scalars() -> None:
    """A vector whose start is not known to be aligned is loaded by elements."""

    def body(tx: Any, a: Any, b: Any) -> None:
        I.buffer_store(b, a[I.ramp(tx * 3 + 1, 1, 4)], [I.ramp(tx * 4, 1, 4)])

    a = np.arange(128, dtype="float32")
    _, b = Built(kernel({"a": (128, "float32"), "b": (128, "float32")}, body))(executor(), a, np.zeros_like(a))
    np.testing.assert_array_equal(b, (np.arange(32)[:, None] * 3 + 1 + np.arange(4)).reshape(-1))


def test_lanes_are_shuffled() -> None:
    """Shuffles of one and of several vectors, wider than SPIR-V's."""

    def body(tx: Any, a: Any, b: Any) -> None:
        value = I.bind(a[I.ramp(tx * 8, 1, 8)])
        turned = tirx.Shuffle([value], [7, 6, 5, 4, 3, 2, 1, 0])
        both = tirx.Shuffle([value, turned], [0, 8, 1, 9, 2, 10, 3, 11])
        I.buffer_store(b, both, [I.ramp(tx * 8, 1, 8)])

    a = np.arange(THREADS * 8, dtype="int32")
    _, b = Built(kernel({"a": (len(a), "int32"), "b": (len(a), "int32")}, body))(executor(), a, np.zeros_like(a))
    rows = a.reshape(-1, 8)
    expected = np.stack([rows[:, :4], rows[:, :3:-1]], axis=2).reshape(-1)
    np.testing.assert_array_equal(b, expected)


def test_packed_codes_become_halves() -> None:
    """What a quantised kernel does: words of eight 4-bit codes, shifted, masked, scaled in half precision."""

    def body(tx: Any, words: Any, scale: Any, out: Any) -> None:
        pack = I.bind(words[I.ramp(tx * 4, 1, 4)])
        for k in range(4):
            word = tirx.Broadcast(tirx.Shuffle([pack], [k]), 8)
            codes = (word >> tirx.Cast("uint32x8", I.ramp(0, 4, 8))) & tirx.Broadcast(tirx.const(15, "uint32"), 8)
            value = (tirx.Cast("float16x8", codes) - tirx.Broadcast(tirx.const(8, "float16"), 8)) * scale[tx]
            I.buffer_store(out, value, [I.ramp(tx * 32 + k * 8, 1, 8)])

    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 32, THREADS * 4, dtype="uint32")
    scale = rng.standard_normal(THREADS).astype("float16")
    function = kernel({"words": (128, "uint32"), "scale": (THREADS, "float16"), "out": (1024, "float16")}, body)
    *_, out = Built(function)(executor("float16", "storage16"), words, scale, np.zeros(1024, "float16"))
    codes = (words[:, None] >> np.arange(0, 32, 4, dtype="uint32")) & 15
    expected = ((codes.astype("float16") - 8).reshape(THREADS, 32) * scale[:, None]).reshape(-1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "uint8", "int64"])
def test_shared_memory(dtype: str) -> None:
    """Threads read behind a barrier what others wrote, through workgroup memory of any type."""

    def body(tx: Any, a: Any, b: Any) -> None:
        shared = I.alloc_buffer((THREADS,), dtype, scope="shared")
        I.buffer_store(shared, a[tx], [tx])
        I.evaluate(I.tvm_storage_sync("shared"))
        I.buffer_store(b, shared[THREADS - 1 - tx], [tx])

    a = np.random.default_rng(2).integers(0, 2 if dtype == "bool" else 100, THREADS).astype(dtype)
    device = executor("float16", "int8", "int64", "storage8", "storage16")
    _, b = Built(kernel({"a": (THREADS, dtype), "b": (THREADS, dtype)}, body))(device, a, np.zeros_like(a))
    np.testing.assert_array_equal(b, a[::-1])


def test_shared_vectors_and_scalars() -> None:
    """An array in shared memory written as vectors of 4 and read as scalars at run-time positions, and back."""

    def body(tx: Any, a: Any, b: Any) -> None:
        shared = I.alloc_buffer((THREADS * 4,), "float16", scope="shared")
        I.buffer_store(shared, a[I.ramp(tx * 4, 1, 4)], [I.ramp(tx * 4, 1, 4)])
        I.evaluate(I.tvm_storage_sync("shared"))
        for k in range(4):
            I.buffer_store(b, shared[k * THREADS + (tx * 5) % THREADS], [tx * 4 + k])

    a = np.random.default_rng(3).standard_normal(THREADS * 4).astype("float16")
    function = kernel({"a": (128, "float16"), "b": (128, "float16")}, body)
    _, b = Built(function)(executor("float16", "storage16"), a, np.zeros_like(a))
    np.testing.assert_array_equal(b, a.reshape(4, THREADS)[:, np.arange(THREADS) * 5 % THREADS].T.reshape(-1))


def test_tree_reduction() -> None:
    """A sum over 128 threads by halves: a barrier at each level, inside a loop."""

    @T.prim_func
    def main(a: T.Buffer((1024,), "float32"), b: T.Buffer((8,), "float32")):
        T.func_attr({"tirx.noalias": True})
        bx = T.launch_thread("blockIdx.x", 8)
        tx = T.launch_thread("threadIdx.x", 128)
        s = T.alloc_buffer((128,), "float32", scope="shared")
        s[tx] = a[bx * 128 + tx]
        for k in range(7):
            T.tvm_storage_sync("shared")
            if tx < T.shift_right(64, k):
                s[tx] = s[tx] + s[tx + T.shift_right(64, k)]
        if tx == 0:
            b[bx] = s[0]

    a = np.random.default_rng(4).integers(-50, 50, 1024).astype("float32")
    _, b = Built(main)(executor(), a, np.zeros(8, "float32"))
    np.testing.assert_array_equal(b, a.reshape(8, 128).sum(1))


def test_storage_buffer_behind_a_barrier_is_coherent() -> None:
    """A buffer that a kernel with barriers both reads and writes is declared Coherent."""

    def body(tx: Any, a: Any) -> None:
        I.buffer_store(a, a[tx] * 2, [tx])
        I.evaluate(I.tvm_storage_sync("shared"))
        I.buffer_store(a, a[THREADS - 1 - tx] + 1, [THREADS + tx])

    built = Built(kernel({"a": (2 * THREADS, "int32")}, body))
    (shader,) = built.shaders.values()
    assert decorations(shader, Decoration.COHERENT) == 1
    a = np.arange(2 * THREADS, dtype="int32")
    (found,) = built(executor(), a)
    np.testing.assert_array_equal(found[THREADS:], a[:THREADS][::-1] * 2 + 1)


@pytest.mark.parametrize("name", ["", "_xor", "_up", "_down"])
@pytest.mark.parametrize("width", [8, 4])
def test_subgroup_shuffles(name: str, width: int) -> None:
    """Shuffles within groups of `width` lanes give what CUDA's give, at the borders as well."""
    device = executor("shuffle")
    if device.info.subgroup_size % 8:
        pytest.skip(f"{device.info.name} has subgroups of {device.info.subgroup_size}")
    op = f"tirx.tvm_warp_shuffle{name}"

    def body(tx: Any, a: Any, b: Any) -> None:
        mask = I.bind(tirx.call_intrin("uint32", "tirx.tvm_warp_activemask"))
        moved = tirx.call_intrin("float32", op, mask, a[tx], 3, width, 8)
        I.buffer_store(b, moved, [tx])

    a = np.random.default_rng(5).standard_normal(THREADS).astype("float32")
    _, b = Built(kernel({"a": (THREADS, "float32"), "b": (THREADS, "float32")}, body))(device, a, np.zeros_like(a))
    lane = np.arange(THREADS)
    within, first = lane % width, lane // width * width
    source = {
        "": first + 3 % width,
        "_xor": first + (within ^ 3),
        "_up": np.where(within >= 3, lane - 3, lane),
        "_down": np.where(within + 3 < width, lane + 3, lane),
    }[name]
    np.testing.assert_array_equal(b, a[source])


def test_many_scalars_come_in_a_uniform_buffer(tmp_path: Path) -> None:
    """17 scalars exceed 128 bytes of push constants: the flag is set, and all of them arrive."""
    for count, expected in ((16, 0), (17, 1)):
        with IRBuilder() as builder, I.prim_func():
            I.func_name("main")
            I.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            types = ["int64", "int32", "float32", "uint32", "float64"]
            scalars = [I.arg(f"s{k}", tirx.Var(f"s{k}", types[k % 5])) for k in range(count)]
            out = I.arg("out", I.buffer((32,), "float64"))
            with I.launch_thread("blockIdx.x", 1), I.launch_thread("threadIdx.x", 1):
                for k, scalar in enumerate(scalars):
                    I.buffer_store(out, tirx.Cast("float64", scalar), [k])
        built = Built(builder.get())
        (shader,) = built.shaders.values()
        assert shader.flag == expected
        validate([shader], tmp_path)
        values = [k * 3 + 1 if types[k % 5][0] in "iu" else k * 1.5 for k in range(count)]
        (found,) = built(executor("int64", "float64"), *values, np.zeros(32))
        np.testing.assert_array_equal(found[:count], values)


def test_atomic_addition() -> None:
    """Threads of several blocks count in one element."""

    @T.prim_func
    def main(a: T.Buffer((256,), "int32"), b: T.Buffer((8,), "int32")):
        T.func_attr({"tirx.noalias": True})
        bx = T.launch_thread("blockIdx.x", 4)
        tx = T.launch_thread("threadIdx.x", 64)
        T.evaluate(T.call_intrin("int32", "tirx.atomic_add", T.address_of(b[a[bx * 64 + tx]]), 1))

    a = np.random.default_rng(6).integers(0, 8, 256).astype("int32")
    _, b = Built(main)(executor(), a, np.zeros(8, "int32"))
    np.testing.assert_array_equal(b, np.bincount(a, minlength=8))


def test_only_needed_capabilities() -> None:
    """Loading and storing halves takes 16-bit storage; computing with them Float16 as well; int32 neither."""

    def convert(tx: Any, a: Any, b: Any) -> None:
        I.buffer_store(b, tirx.Cast("float32", a[tx]), [tx])

    def compute(tx: Any, a: Any, b: Any) -> None:
        I.buffer_store(b, tirx.Cast("float32", a[tx] * a[tx]), [tx])

    expected = {
        ("float16", convert): {Capability.SHADER, Capability.STORAGE_BUFFER_16BIT_ACCESS},
        ("float16", compute): {Capability.SHADER, Capability.STORAGE_BUFFER_16BIT_ACCESS, Capability.FLOAT16},
        ("bool", convert): {Capability.SHADER, Capability.STORAGE_BUFFER_8BIT_ACCESS},
        ("int32", compute): {Capability.SHADER},
        ("int64", compute): {Capability.SHADER, Capability.INT64},
    }
    for (dtype, body), capabilities in expected.items():
        built = Built(kernel({"a": (THREADS, dtype), "b": (THREADS, "float32")}, body))
        (shader,) = built.shaders.values()
        assert shader.capabilities == capabilities, (dtype, body.__name__)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("supports_float16", False, "FLOAT16"),
        ("max_shared_memory_per_block", 63, "bytes of shared memory"),
        ("max_threads_per_block", 16, "threads in a block"),
    ],
)
def test_limits_are_named(attribute: str, value: Any, message: str) -> None:
    """A kernel that a device cannot run is refused with the limit."""

    def body(tx: Any, a: Any, b: Any) -> None:
        shared = I.alloc_buffer((THREADS,), "float16", scope="shared")
        I.buffer_store(shared, a[tx] * a[tx], [tx])
        I.evaluate(I.tvm_storage_sync("shared"))
        I.buffer_store(b, shared[THREADS - 1 - tx], [tx])

    function = kernel({"a": (THREADS, "float16"), "b": (THREADS, "float16")}, body)
    with pytest.raises(RuntimeError, match=message):
        Built(function, vulkan_target(**{attribute: value}))


def test_views_of_one_array() -> None:
    """Shared memory declared again under another type of the same size is the same memory."""

    @T.prim_func
    def main(a: T.Buffer((32,), "float32"), b: T.Buffer((32,), "uint32")):
        T.func_attr({"tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        tx = T.launch_thread("threadIdx.x", 32)
        s = T.alloc_buffer((32,), "float32", scope="shared")
        u = T.decl_buffer((32,), "uint32", data=s.data, scope="shared")
        s[tx] = a[tx]
        T.tvm_storage_sync("shared")
        b[tx] = u[31 - tx]

    a = np.random.default_rng(7).standard_normal(32).astype("float32")
    _, b = Built(main)(executor(), a, np.zeros(32, "uint32"))
    np.testing.assert_array_equal(b, a[::-1].view("uint32"))


def test_eight_halves_are_one_access() -> None:
    """Aligned vectors of 8 halves move as 16 bytes, the widest access."""

    def body(tx: Any, a: Any, b: Any) -> None:
        I.buffer_store(b, a[I.ramp(tx * 8, 1, 8)] * tirx.Broadcast(tirx.const(2, "float16"), 8), [I.ramp(tx * 8, 1, 8)])

    built = Built(kernel({"a": (256, "float16"), "b": (256, "float16")}, body))
    (shader,) = built.shaders.values()
    assert sum(op == Op.LOAD for op, _ in shader._instructions()) == 2, "the vector and the thread index"
    a = np.random.default_rng(8).standard_normal(256).astype("float16")
    _, b = built(executor("float16", "int16", "storage16"), a, np.zeros_like(a))
    np.testing.assert_array_equal(b, a * 2)
