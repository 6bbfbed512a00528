"""Runs TensorIR through our SPIR-V generator on the Vulkan driver that is here, and through LLVM as the oracle.

Host code is TVM's own, built for LLVM, so that grids, branches and hoisted scalars are what a library has.
It looks a kernel up by name among the global functions, where a Python function launches it.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.errors import EnvironmentMissingError
from awq_compile.targets.vulkan.codegen import BUILD, build_shaders
from awq_compile.targets.vulkan.spirv.assembler import to_bytes
from awq_compile.targets.vulkan.spirv.shader import Shader
from awq_compile.verify.executors.vulkan import VulkanExecutor
from awq_compile.verify.launch_table import View, run_prim_func
from awq_compile.verify.record import LaunchRecorder

_SUPPORTS = ("float16", "float64", "int8", "int16", "int64", "8bit_buffer", "16bit_buffer")
_SET_DEVICE = "__tvm_set_device"
HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


def vulkan_target(**attributes: Any) -> Any:
    """A generic Vulkan device of desktop size."""
    defaults: dict[str, Any] = {f"supports_{name}": True for name in _SUPPORTS}
    defaults |= {
        "supports_storage_buffer_storage_class": True,
        "supported_subgroup_operations": 0x1F,
        "max_threads_per_block": 256,
        "max_num_threads": 256,
        "max_shared_memory_per_block": 32768,
        "thread_warp_size": 1,
    }
    return tvm.target.Target({"kind": "vulkan", **defaults, **attributes}, host=HOST)


@functools.cache
def _executor() -> VulkanExecutor | str:
    try:
        return VulkanExecutor()
    except EnvironmentMissingError as error:
        return str(error)


def executor(*features: str) -> VulkanExecutor:
    """The machine's Vulkan device; skips the test where there is none, or none with these features."""
    found = _executor()
    if isinstance(found, str):
        pytest.skip(f"no Vulkan device: {found}")
    missing = [f for f in features if f not in found.info.features]
    if missing:
        pytest.skip(f"{found.info.name} has no {', '.join(missing)}")
    return found


def validate(shaders: Sequence[Shader], folder: Path) -> None:
    """Fails with what spirv-val finds in any of them."""
    program = shutil.which("spirv-val")
    if program is None:
        pytest.skip("spirv-val is not installed: apt-get install spirv-tools")
    errors = []
    for shader in shaders:
        path = folder / f"{shader.name}.spv"
        path.write_bytes(to_bytes(shader.words))
        command = [program, "--target-env", "vulkan1.2", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors.append(f"{shader.name}: {done.stderr.strip()}")
    assert not errors, "\n".join(errors)


class Built:
    """Functions with kernels for Vulkan and host code for this machine.

    With a `recorder`, those that allocate memory of the device run by its launch tables: the wheel's runtime has none.
    """

    def __init__(
        self,
        module: Any,
        target: Any | None = None,
        instruments: Sequence[Any] = (),
        recorder: LaunchRecorder | None = None,
    ) -> None:
        self._tables = {} if recorder is None else recorder.tables
        instruments = [*instruments, *([] if recorder is None else [recorder.instrument()])]
        self.shaders: dict[str, Shader] = {}
        self._tags: dict[str, list[str]] = {}
        self._memory: dict[int, np.ndarray] = {}
        self.lowered: list[tuple[Any, Any]] = []
        self.generation_seconds = 0.0
        if not isinstance(module, tvm.IRModule):
            module = tvm.IRModule({"main": module.with_attr("global_symbol", "main")})
        config = {"tirx.disable_assert": True}
        with self._generator(), tvm.transform.PassContext(config=config, instruments=list(instruments)):
            self._host = tvm.compile(module, target=target or vulkan_target())

    @contextmanager
    def _generator(self) -> Iterator[None]:
        """Like `vulkan_codegen`, but the device module is empty, so that kernels are looked up elsewhere."""

        def build(module: Any, target: Any) -> Any:
            start = time.monotonic()
            self.shaders |= build_shaders(module, target)
            self.generation_seconds += time.monotonic() - start
            self.lowered.append((module, target))
            for function in module.functions.values():
                tags = [str(tag) for tag in function.attrs["tirx.kernel_launch_params"]]
                self._tags[str(function.attrs["global_symbol"])] = tags
            return tvm_ffi.get_global_func("target.build.llvm")(tvm.IRModule({}), tvm.target.Target(HOST))

        tvm_ffi.register_global_func(BUILD, build, override=True)
        try:
            yield
        finally:
            tvm_ffi.remove_global_func(BUILD)

    def __call__(self, device: VulkanExecutor, *args: np.ndarray | int | float, name: str = "main") -> list[np.ndarray]:
        """Runs a function on copies of arrays; returns all arrays as they are afterwards."""
        tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
        with self.launchable(device):
            self.call(name, *tensors)
        return [t.numpy() for t in tensors if isinstance(t, tvm.runtime.Tensor)]

    def call(self, name: str, *args: Any) -> Any:
        """Calls a function on TVM tensors of the CPU, within `launchable`."""
        table = self._tables.get(name, {"body": []})
        if any(statement[0] == "alloc" for statement in table["body"]):
            run_prim_func(table, self._device, [view_of(a) if isinstance(a, tvm.runtime.Tensor) else a for a in args])
            return None
        self._memory = memory_of([a for a in args if isinstance(a, tvm.runtime.Tensor)])
        return self._host[name](*args)

    @contextmanager
    def launchable(self, device: VulkanExecutor) -> Iterator[None]:
        """Within the block, the functions' kernels run on `device`."""
        device.load(self.shaders)
        self._device = device

        def launcher(kernel: str) -> Any:
            kinds, tags = self.shaders[kernel].arguments, self._tags[kernel]

            def launch(*given: Any) -> None:
                values, extents = given[: len(kinds)], given[len(kinds) :]
                sizes = dict(zip(tags, map(int, extents), strict=True))
                grid = tuple(sizes.get(f"blockIdx.{axis}", 1) for axis in "xyz")
                block = tuple(sizes.get(f"threadIdx.{axis}", 1) for axis in "xyz")
                memory = self._memory
                found = [memory[int(v.value or 0)] if k == "handle" else v for k, v in zip(kinds, values, strict=True)]
                device.launch(kernel, found, grid, block)

            return launch

        functions = {kernel: launcher(kernel) for kernel in self.shaders}
        with global_functions({**functions, _SET_DEVICE: lambda *_: None}):  # the wheel's knows no Vulkan
            yield


@contextmanager
def global_functions(functions: Mapping[str, Any]) -> Iterator[None]:
    """Registers functions in TVM, and restores what was there."""
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in functions}
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                tvm_ffi.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, function, override=True)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def _place(tensor: Any) -> tuple[int, int, int]:
    """Start of a tensor's memory, its own offset there in bytes, and where it ends."""
    pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_in.restype, pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    capsule = tensor.__dlpack__()  # owns what is read of it
    view = _DLTensor.from_address(pointer_in(capsule, b"dltensor"))
    size = int(np.prod([view.shape[i] for i in range(view.ndim)], dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
    return view.data or 0, view.byte_offset, view.byte_offset + size


def _bytes(base: int, extent: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * extent).from_address(base), np.uint8) if extent else np.zeros(0, np.uint8)


def memory_of(tensors: Sequence[Any]) -> dict[int, np.ndarray]:
    """Address that a kernel gets → all bytes behind it that belong to one of the tensors.

    A kernel gets the start of the memory, and the offset of a view as a scalar.
    """
    extents: dict[int, int] = {0: 0}
    for base, _, end in map(_place, tensors):
        extents[base] = max(extents.get(base, 0), end)
    return {base: _bytes(base, extent) for base, extent in extents.items()}


def view_of(tensor: Any) -> View:
    """A tensor of the CPU, in place, as a launch table takes it."""
    base, offset, end = _place(tensor)
    kind = np.dtype(tensor.dtype)
    return View(_bytes(base, end).view(kind), offset // kind.itemsize, tuple(map(int, tensor.shape)))


def run_llvm(function: Any, *args: np.ndarray | int | float) -> list[np.ndarray]:
    """The oracle: the unscheduled function on the CPU."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    built = tvm.compile(module, target="llvm")
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    built["main"](*tensors)
    return [t.numpy() for t in tensors if isinstance(t, tvm.runtime.Tensor)]


def elementwise(inputs: Sequence[str], outputs: Sequence[tuple[str, Any]], count: int, *, gpu: bool = True) -> Any:
    """z_k[i] = f_k(a_0[i], a_1[i], …) for (dtype, f_k) in `outputs`: one kernel, or a loop for the CPU."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        sources = [T.arg(f"a{k}", T.buffer((count,), dtype)) for k, dtype in enumerate(inputs)]
        targets = [T.arg(f"z{k}", T.buffer((count,), dtype)) for k, (dtype, _) in enumerate(outputs)]

        def body(i: Any) -> None:
            for target, (_, function) in zip(targets, outputs, strict=True):
                T.buffer_store(target, function(*[source[i] for source in sources]), [i])

        if gpu:
            blocks = T.launch_thread("blockIdx.x", -(-count // 64))
            with blocks as bx, T.launch_thread("threadIdx.x", 64) as tx, T.If(bx * 64 + tx < count), T.Then():
                body(bx * 64 + tx)
        else:
            with T.serial(0, count) as i:
                body(i)
    return builder.get()


def run_elementwise(
    device: VulkanExecutor, inputs: Sequence[np.ndarray], outputs: Sequence[tuple[str, Any]]
) -> list[np.ndarray]:
    """The results of `elementwise` on the Vulkan device."""
    count = len(inputs[0])
    function = elementwise([str(a.dtype) for a in inputs], outputs, count)
    empty = [np.zeros(count, dtype) for dtype, _ in outputs]
    return Built(function)(device, *inputs, *empty)[len(inputs) :]
