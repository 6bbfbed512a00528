"""The CPU target builds for any triple, with the vector instructions of its table, and refuses what it cannot."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tvm

from awq_compile.compiler import export_executable
from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.targets import known_targets, resolve_target
from awq_compile.targets.cpu import AVX2, AVX512, NEON, RV64GC, CpuTarget

PROBLEM = MatmulProblem(64, 256, QuantSpec(4, 32), Epilogue(activation="silu_mul"))


def built(target: Any) -> Any:
    """One quantised linear, compiled for a target."""
    function = scheduled_linear(PROBLEM, target.rule(PROBLEM)).with_attr("global_symbol", PROBLEM.name)
    return tvm.compile(tvm.IRModule({PROBLEM.name: function}), target=tvm.target.Target(target.tvm_target))


@pytest.mark.parametrize(
    ("name", "unit", "instruction"),
    [
        ("cpu:aarch64-linux-gnu", NEON, "fmla"),
        ("cpu:arm64-apple-macos", NEON, "fmla"),
        ("cpu:x86_64-windows-gnu", AVX2, "vfmadd"),
        ("cpu:x86_64-linux-gnu@znver4", AVX512, "zmm"),
        ("cpu:riscv64-linux-gnu", RV64GC, "fmadd.s"),
    ],
)
def test_the_vector_unit_of_a_triple_is_used(name: str, unit: object, instruction: str) -> None:
    """Its instructions are in the assembly."""
    target = resolve_target(name)
    assert isinstance(target, CpuTarget) and target.unit is unit
    module = built(target)
    assembly = (module.mod if hasattr(module, "mod") else module).inspect_source("asm")
    assert instruction in assembly


def magic(path: Path) -> bytes:
    """First bytes of a file."""
    return path.read_bytes()[:4]


@pytest.mark.parametrize(
    ("name", "suffix", "start"),
    [
        ("cpu", ".so", b"\x7fELF"),
        ("cpu:aarch64-linux-gnu", ".so", b"\x7fELF"),
        ("cpu:arm64-apple-macos", ".dylib", b"\xcf\xfa\xed\xfe"),
    ],
)
def test_libraries_are_linked_reproducibly(name: str, suffix: str, start: bytes, tmp_path: Path) -> None:
    """By zig, with no compiler of the system; twice, with equal bytes."""
    target = resolve_target(name)
    assert target.library_suffix == suffix
    paths = [tmp_path / f"{i}" / f"lib{suffix}" for i in range(2)]
    for path in paths:
        path.parent.mkdir()
        export_executable(built(target), target, path)
    assert magic(paths[0]) == start
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [f"lib{suffix}"]


def test_a_linker_that_the_user_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler driver in AWQ_COMPILE_LINKER; one that is not there is an error that says where to look."""
    target, path = resolve_target("cpu"), tmp_path / "lib.so"
    monkeypatch.setenv("AWQ_COMPILE_LINKER", f"{sys.executable} -m ziglang cc")
    export_executable(built(target), target, path)
    assert magic(path) == b"\x7fELF"
    monkeypatch.setenv("AWQ_COMPILE_LINKER", "no-such-compiler")
    with pytest.raises(EnvironmentMissingError) as caught:
        export_executable(built(target), target, path)
    assert caught.value.hint == "check AWQ_COMPILE_LINKER"


def test_what_cannot_be_linked_is_an_archive_of_objects(tmp_path: Path) -> None:
    """Without times or owners, so equal builds give equal bytes."""
    target = resolve_target("cpu:x86_64-windows-msvc")
    assert target.library_suffix == ".tar"
    path = tmp_path / "lib.tar"
    export_executable(built(target), target, path)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert members and all(m.mtime == 0 and m.uid == 0 and "/" not in m.name for m in members)


def test_a_library_for_this_machine_runs_in_a_fresh_process(tmp_path: Path) -> None:
    """Nothing of the compiling process is needed."""
    path = tmp_path / "lib.so"
    export_executable(built(resolve_target("cpu")), resolve_target("cpu"), path)
    code = f"import tvm; print(tvm.runtime.load_module({str(path)!r})[{PROBLEM.name!r}] is not None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("name", ["cpuu", "Cpu", "gpu", "cpu:", "cpu:not a triple", "cpu:../x", ""])
def test_unknown_targets_are_refused(name: str) -> None:
    """With what to type instead."""
    if name == "cpu:":
        assert resolve_target(name).name == "cpu"
        return
    with pytest.raises(UsageError) as caught:
        resolve_target(name)
    assert caught.value.hint


@pytest.mark.parametrize("name", known_targets())
def test_the_examples_resolve(name: str) -> None:
    """What `awq-compile targets` lists can be typed."""
    assert resolve_target(name).name == name
