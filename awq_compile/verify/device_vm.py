"""A GPU library's virtual machine on this machine's CPU, with every device kernel run by its executor.

The machine's code and the device code come out of the library, the launches from the tables beside it. A
virtual machine without the library's host code looks a PrimFunc up among the global functions: there, a Python
function follows the launch table. PrimFuncs that launch nothing, which compute sizes, are built again for this
machine, for the library's host may be another. CUDA graphs are replayed by `graph_replay`.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.compiler import (
    CompileContext,
    device_passes,
    lowered_module,
    plan_passes,
    system_lib_prefix,
    vm_passes,
)
from awq_compile.contract.objects import module_blob
from awq_compile.errors import ArtifactError, AwqCompileError
from awq_compile.targets.cuda_source import check_source
from awq_compile.targets.vulkan.blob import parse_blob
from awq_compile.verify.device_code import device_modules
from awq_compile.verify.execution import Loaded, load
from awq_compile.verify.executors.base import Argument, Size3
from awq_compile.verify.graph_replay import GraphReplay
from awq_compile.verify.launch_table import View, run_prim_func
from awq_compile.verify.sidecar import read_sidecar

_EXECUTABLE: Final = "relax.VMExecutable"
_CPU: Final = 1  # DLPack's kDLCPU
_POOLED: Final = 2  # TVM's AllocatorType::kPooled
_BEHIND: Final = 512  # integers behind those that a kernel may use
_Array = npt.NDArray[Any]


@dataclass
class DeviceVM:
    """`vm` is the initialised virtual machine; `launches` counts by kernel. `failure` is what an executor found."""

    vm: Any
    device: str
    launches: Counter[str] = field(default_factory=Counter)
    failure: AwqCompileError | None = None


@dataclass(frozen=True)
class _Counting:
    """An executor that counts launches."""

    inner: Loaded
    launches: Counter[str]

    def load(self, code: Any) -> None:
        raise AssertionError("loaded already")

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        self.inner.launch(kernel, args, grid, block, dynamic_shared)
        self.launches[kernel] += 0 not in grid


@contextmanager
def device_vm(library: Path, context: CompileContext) -> Iterator[DeviceVM]:
    """The library that `context` was compiled to. Use the machine within the block only.

    Raises `EnvironmentMissingError` where nothing runs the device code here.
    """
    from awq_compile.runtime.lean_tvm import tvm

    target = context.target
    blob = module_blob(library)
    sidecar = read_sidecar(library)
    prefix = system_lib_prefix(library) if target.system_lib else ""
    tables = {name.removeprefix(prefix): table for name, table in sidecar.tables.items()}
    modules = device_modules(blob, library.name)
    for module in modules:
        if module.kind == "cuda":
            check_source(sidecar.source, module.code, module.format)
    executable = tvm.get_global_func(f"ffi.Module.load_from_bytes.{_EXECUTABLE}")(_executable(blob, library))
    with load(modules, sidecar.source, target, orders=False) as loaded:
        found = DeviceVM(None, loaded.device)
        executor = _Counting(loaded, found.launches)

        def kernel(table: dict[str, Any]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                arguments, copies = _arguments(args)
                try:
                    run_prim_func(table, executor, arguments)
                except AwqCompileError as error:
                    found.failure = found.failure or error
                    raise
                for memory, copy in copies:
                    memory[...] = copy[: len(memory)]

            return call

        functions = {name: kernel(table) for name, table in tables.items()}
        functions = {**_host_functions(context, frozenset(tables)), **functions}
        of_library = {prefix + name: function for name, function in functions.items()}
        with _global_functions({**of_library, **GraphReplay().functions()}):
            found.vm = initialised(executable)
            yield found


def initialised(executable: Any) -> Any:
    """The virtual machine of a loaded library, on the CPU."""
    vm = executable["vm_load_executable"]()
    vm["vm_initialization"](_CPU, 0, _POOLED, _CPU, 0, _POOLED)
    return vm


def _executable(blob: bytes, library: Path) -> bytes:
    payload = next((m.payload for m in parse_blob(blob).modules if m.kind == _EXECUTABLE), None)
    if payload is None:
        raise ArtifactError(f"{library} holds no code of a virtual machine")
    return payload


def _host_functions(context: CompileContext, launching: frozenset[str]) -> Mapping[str, Any]:
    """The PrimFuncs that launch nothing, for this machine."""
    import tvm
    from tvm import tirx

    with tvm.target.Target(context.target.tvm_target), tvm.transform.PassContext(opt_level=3):
        passes = tvm.transform.Sequential([*device_passes(), *plan_passes(context.captured), *vm_passes()])
        module = passes(lowered_module(context))
    functions = {
        str(var.name_hint): function
        for var, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc) and str(var.name_hint) not in launching
    }
    host = tvm.target.Target("llvm")
    functions = {name: f.with_attr("global_symbol", name).with_attr("target", host) for name, f in functions.items()}
    built = tvm.tirx.build(tvm.IRModule(functions), target=host)
    return {name: built[name] for name in functions}


@contextmanager
def _global_functions(functions: Mapping[str, Any]) -> Iterator[None]:
    """Registers functions in TVM, and restores what was there."""
    import tvm_ffi

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
    """`DLTensor` of dlpack.h, at the start of a `DLManagedTensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def _arguments(args: Sequence[Any]) -> tuple[list[Argument | View], list[tuple[_Array, _Array]]]:
    """Tensors as views of the memory that they lie in; the memory is as long as the farthest of them.

    A kernel gets the start of the memory, and the offset of a view as a scalar. Integers are (memory, copy) as well:
    the copy, with more behind it, is what the kernel gets. TVM's kernels read, but do not use, entries behind the end.
    """
    described = [_described(a) if hasattr(a, "__dlpack__") else a for a in args]
    ends: dict[int, int] = {}
    for item in described:
        if isinstance(item, _Tensor):
            ends[item.data] = max(ends.get(item.data, 0), item.offset + item.nbytes)
    copies: dict[int, tuple[_Array, _Array]] = {}
    found: list[Argument | View] = []
    for item in described:
        if not isinstance(item, _Tensor):
            found.append(item)
            continue
        base = _memory(item, ends[item.data])
        if item.dtype == np.int32 and base.size:
            _, base = copies.setdefault(item.data, (base, np.concatenate([base, np.zeros(_BEHIND, base.dtype)])))
        found.append(View(base, item.offset // item.dtype.itemsize, item.shape))
    return found, list(copies.values())


@dataclass(frozen=True)
class _Tensor:
    data: int
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _described(tensor: Any) -> _Tensor:
    pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_in.restype, pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    capsule = tensor.__dlpack__()
    view = _DLTensor.from_address(pointer_in(capsule, b"dltensor") or 0)
    shape = tuple(int(view.shape[i]) for i in range(view.ndim))
    return _Tensor(view.data or 0, int(view.byte_offset), shape, np.dtype(str(tensor.dtype)))


def _memory(tensor: _Tensor, end: int) -> _Array:
    count = end // tensor.dtype.itemsize
    if not count or not tensor.data:
        return np.zeros(0, tensor.dtype)
    memory: Any = (ctypes.c_uint8 * (count * tensor.dtype.itemsize)).from_address(tensor.data)
    return np.frombuffer(memory, tensor.dtype)
