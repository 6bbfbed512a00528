"""A CUDA library carries machine code that its runtime loads without a compiler, tied to the source beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from helpers_kernels import RULES
from tvm import te
from tvm.s_tir import dlight

from awq_compile.targets import resolve_target
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cuda_source import check_source, digests
from awq_compile.verify.device_code import library_code
from awq_compile.verify.execution import load
from awq_compile.verify.launch_table import run_prim_func
from awq_compile.verify.record import LaunchRecorder
from awq_compile.verify.sidecar import read_sidecar, write_sidecar


def exported(target: TargetSpec, library: Path) -> None:
    """A library that doubles vectors, as `compile_library` exports one."""
    n = te.var("n", "int64")
    x = te.placeholder((n,), "float32", name="x")
    double = te.create_prim_func([x, te.compute((n,), lambda i: x[i] * 2, name="y")]).with_attr("global_symbol", "f")
    tvm_target, recorder = tvm.target.Target(target.tvm_target), LaunchRecorder()
    with target.building(), tvm_target, tvm.transform.PassContext(instruments=[recorder.instrument()]):
        module = dlight.ApplyDefaultSchedule(*RULES["fallback"])(tvm.IRModule({"f": double}))
        built = tvm.tirx.build(module, target=tvm_target)

        def write(path: str, objects: list[str], **_: Any) -> None:
            target.link(Path(path), [Path(o) for o in objects])

        built.export_library(str(library), fcompile=write)
    write_sidecar(library, recorder.tables, built)


@pytest.mark.parametrize("archs", [("sm_80",), ("sm_75", "sm_90")])
def test_a_library_carries_machine_code(archs: tuple[str, ...], tmp_path: Path) -> None:
    """For each architecture, of the very source that runs on the shim; and that source computes."""
    if shutil.which("nvcc") is None and len(archs) > 1:
        pytest.skip("nvcc is not on PATH")
    if shutil.which("nvcc") is None:
        pytest.importorskip("cuda.bindings")
    target, library = resolve_target(f"cuda:{'+'.join(archs)}"), tmp_path / "double.so"
    exported(target, library)
    (module,), sidecar = library_code(library), read_sidecar(library)
    assert module.kind == "cuda" and module.format in ("fatbin", "cubin")
    assert b"\x7fELF" in module.code and b"__global__" not in module.code
    assert len(digests(module.code, module.format)) == len(archs)
    check_source(sidecar.source, module.code, module.format)
    value, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    with load([module], sidecar.source, target) as loaded:
        run_prim_func(sidecar.tables["f"], loaded, [value, out])
    np.testing.assert_array_equal(out, 2 * value)
