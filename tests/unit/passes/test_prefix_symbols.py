"""Two libraries whose functions have the same names live in one process, each behind its prefix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import tvm
from helpers_build import cpu_target
from tvm import relax
from tvm.relax import transform as t

from awq_compile.contract.objects import read_objects
from awq_compile.passes.prefix_symbols import PrefixSymbols

# Linked into one library, as an app is; the registry of system libraries is that of the process.
LOADER = """
import ctypes, sys, numpy as np, tvm
ctypes.CDLL(sys.argv[1])
for prefix, expected in (("first_model_", 3.0), ("second_model_", 4.0)):
    module = tvm.get_global_func("ffi.SystemLib")(prefix)
    vm = module["vm_load_executable"]()
    vm["vm_initialization"](1, 0, 2, 1, 0, 2)
    found = vm["main"](tvm.runtime.tensor(np.ones(5, "float32"))).numpy()
    assert (found == expected).all(), (prefix, found)
    assert vm.get_function("add", True) is not None
"""


def objects(folder: Path, prefix: str, value: float) -> list[Path]:
    """x + value, by a PrimFunc `add`."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((5,), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.add(x, relax.const(value, "float32"))))
    passes = (t.LegalizeOps(), t.ToNonDataflow(), t.CallTIRRewrite(), t.LowerAllocTensor(), t.LowerRuntimeBuiltin())
    rest = (t.VMShapeLower(), t.AttachGlobalSymbol(), PrefixSymbols(prefix).as_tvm())
    target = cpu_target()
    with target:
        module = tvm.transform.Sequential([*passes, *rest])(builder.get()).with_attr("system_lib_prefix", prefix)
        executable = relax.build(module, target=target, relax_pipeline=None, system_lib=True)
    kept: list[Path] = []

    def keep(_: str, files: list[str], **__: Any) -> None:
        for file in files:
            kept.append(folder / f"{prefix}{Path(file).name}")
            kept[-1].write_bytes(Path(file).read_bytes())

    executable.export_library(str(folder / f"{prefix}.tar"), fcompile=keep)
    return kept


def test_two_models_in_one_app(tmp_path: Path) -> None:
    first, second = objects(tmp_path, "first_model_", 2.0), objects(tmp_path, "second_model_", 3.0)
    defined = [{s for file in files for o in read_objects(file) for s in o.defined} for files in (first, second)]
    assert "__tvm_ffi_first_model_add" in defined[0] and "__tvm_ffi_second_model_add" in defined[1]
    library = tmp_path / "app.so"
    zig = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", str(library), *map(str, [*first, *second])]
    subprocess.run(zig, check=True)
    subprocess.run([sys.executable, "-c", LOADER, str(library)], check=True)
