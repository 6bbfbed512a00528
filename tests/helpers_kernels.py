"""Builds TIR for a device without the device, and runs what was emitted through an executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.s_tir import dlight as dl
from tvm.target import Target

from awq_compile.verify.executors.base import DeviceCode, Executor
from awq_compile.verify.launch_table import Table, run_prim_func
from awq_compile.verify.record import LaunchRecorder

TARGETS: dict[str, dict[str, Any]] = {
    "cuda": {"kind": "cuda", "arch": "sm_80", "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152},
    "metal": {"kind": "metal", "thread_warp_size": 32, "max_threads_per_block": 1024},
    "opencl": {"kind": "opencl"},
}
RULES = {
    "reduction": (dl.gpu.Reduction(), dl.gpu.GeneralReduction(), dl.gpu.Fallback()),
    "matmul": (dl.gpu.Matmul(), dl.gpu.Reduction(), dl.gpu.Fallback()),
    "fallback": (dl.gpu.Fallback(),),
}


@dataclass(frozen=True)
class Built:
    """A built module: its host code as tables, its kernels as code, and the module to export."""

    tables: dict[str, Table]
    code: DeviceCode
    module: Any


def device_target(kind: str) -> Target:
    return Target(TARGETS[kind], host="llvm")


def build(module: Any, kind: str, rules: str = "reduction") -> Built:
    """Schedules a module (or PrimFunc) with dlight where it is unscheduled and builds it for `kind`."""
    if isinstance(module, tvm.tirx.PrimFunc):
        module = tvm.IRModule({str(module.attrs["global_symbol"]): module})
    target = device_target(kind)
    recorder = LaunchRecorder()
    old = tvm_ffi.get_global_func("tvm_callback_cuda_compile", allow_missing=True)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", lambda code, *_: (code, "cuda"), override=True)
    try:
        with target, tvm.transform.PassContext(opt_level=3, instruments=[recorder.instrument()]):
            module = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
            runtime = tvm.tirx.build(dl.ApplyDefaultSchedule(*RULES[rules])(module), target=target)
    finally:
        if old is not None:
            tvm_ffi.register_global_func("tvm_callback_cuda_compile", old, override=True)
    device = runtime.imports[0]
    source = device.inspect_source("cuda" if kind == "cuda" else "")
    return Built(recorder.tables, device_code(kind, source), runtime)


def device_code(kind: str, source: str) -> DeviceCode:
    """Code in the form in which a library carries it."""
    if kind != "metal":
        return DeviceCode("cl" if kind == "opencl" else kind, source)
    parts = [part.partition("\n") for part in source.split("// Function: ")[1:]]
    return DeviceCode("metal", kernels={name: text for name, _, text in parts})


def run(built: Built, executor: Executor, name: str, args: Sequence[Any]) -> list[str]:
    executor.load(built.code)
    return run_prim_func(built.tables[name], executor, args)


def llvm_run(function: Any, args: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The same function, unscheduled, on the CPU by LLVM: all arguments after the call."""
    name = str(function.attrs["global_symbol"])
    library = tvm.tirx.build(tvm.IRModule({name: function}), target="llvm")
    tensors = [tvm.runtime.tensor(a) for a in args]
    library[name](*tensors)
    return [t.numpy() for t in tensors]
