"""Libraries for Windows are linked here: PE files that export the library and name the DLLs that they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lief
import pytest
import tvm

from awq_compile.compiler import export_executable
from awq_compile.formats import QuantSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.targets import resolve_target
from awq_compile.targets.link import library_suffix, llvm_triple, zig_target
from awq_compile.targets.windows import SUPPORT

GPUS = ["opencl@x86_64-windows-gnu", "vulkan@x86_64-windows-gnu", "vulkan:amd@x86_64-windows-gnu"]


def linked(name: str, path: Path) -> Any:
    """One quantised linear, compiled and linked for a target: the parsed DLL."""
    target = resolve_target(name)
    problem = MatmulProblem(64, 128, QuantSpec(4, 32), Epilogue(activation="silu_mul"), target.dtype)
    function = scheduled_linear(problem, target.rule(problem)).with_attr("global_symbol", problem.name)
    path.parent.mkdir()
    with target.building():
        module = tvm.compile(tvm.IRModule({problem.name: function}), target=tvm.target.Target(target.tvm_target))
        export_executable(module, target, path)
    return lief.PE.parse(str(path))


@pytest.mark.parametrize("name", [*GPUS, "cpu:x86_64-windows-gnu"])
def test_a_dll(name: str, tmp_path: Path) -> None:
    """A PE file for x86-64 that exports the function and the blob of device code and imports TVM's DLL; twice equal."""
    paths = [tmp_path / str(i) / "lib.dll" for i in range(2)]
    dll, _ = (linked(name, path) for path in paths)
    assert resolve_target(name).library_suffix == ".dll"
    data = paths[0].read_bytes()
    assert data[:2] == b"MZ" and data[int.from_bytes(data[60:64], "little") :][:4] == b"PE\0\0"
    assert dll.header.machine == lief.PE.Header.MACHINE_TYPES.AMD64
    assert dll.header.has_characteristic(lief.PE.Header.CHARACTERISTICS.DLL)
    exported = {entry.name for entry in dll.get_export().entries}
    assert any(symbol.startswith("__tvm_ffi_qmatmul") for symbol in exported)
    assert "__tvm_ffi__library_bin" in exported or name.startswith("cpu")
    imported = {library.name: {entry.name for entry in library.entries} for library in dll.imports}
    assert "TVMFFIErrorSetRaisedFromCStrParts" in imported["tvm_ffi.dll"]
    assert imported.keys() <= {"tvm_ffi.dll", "ucrtbase.dll"}
    assert data == paths[1].read_bytes()
    assert sorted(p.name for p in paths[0].parent.iterdir()) == ["lib.dll"]


def test_triples() -> None:
    """LLVM takes the word behind the architecture for a vendor, and writes ELF unless there is one."""
    assert llvm_triple("x86_64-windows-gnu") == "x86_64-pc-windows-gnu"
    assert llvm_triple("x86_64-linux-gnu") == "x86_64-linux-gnu"
    for triple in ("x86_64-windows-gnu", "x86_64-pc-windows-gnu"):
        assert (zig_target(triple), library_suffix(triple)) == ("x86_64-windows-gnu", ".dll")
    for triple in ("x86_64-pc-windows-msvc", "aarch64-windows-gnu"):
        assert library_suffix(triple) == ".tar"


def test_the_stack_probe_touches_every_page() -> None:
    """Pushes and pops match, and the step is a page of 4096 bytes."""
    probe = SUPPORT.partition("___chkstk_ms:")[2]
    assert re.findall(r"push (%r.x)", probe) == re.findall(r"pop (%r.x)", probe)[::-1]
    assert set(re.findall(r"\$(0x\d+)", probe)) == {"0x1000"}
