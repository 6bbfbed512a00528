"""The device code is found in every kind of library that is written, and damage is noticed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import helpers_kernels as hk
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te
from tvm.target import Target

from awq_compile.errors import ArtifactError
from awq_compile.targets.cpu import cpu_target
from awq_compile.targets.vulkan.blob import BlobModule, find_blob, write_blob
from awq_compile.verify.device_code import device_modules, library_code
from awq_compile.verify.launch_table import kernels_of

LIBRARIES = {
    "elf.so": ("x86_64-linux-gnu", "opencl", None),
    "elf.tar": ("aarch64-linux-android", "opencl", "prefix_"),
    "macho.dylib": ("arm64-apple-macos", "metal", None),
    "macho.tar": ("arm64-apple-ios", "metal", "prefix_"),
    "coff.tar": ("x86_64-pc-windows-msvc", "opencl", None),
}


def write_library(path: Path, triple: str, kind: str, prefix: str | None) -> None:
    a = te.placeholder((100,), "float32", name="a")
    function = te.create_prim_func([a, te.compute((100,), lambda i: a[i] + 1, name="b")])
    module = tvm.IRModule({"add": function.with_attr("global_symbol", "add")})
    if prefix is not None:
        module = module.with_attr("system_lib_prefix", prefix)
    target = Target(hk.TARGETS[kind], host={"kind": "llvm", "mtriple": triple})
    with target:
        scheduled = hk.dl.ApplyDefaultSchedule(hk.dl.gpu.Fallback())(module)
    runtime = tvm.tirx.build(scheduled, target=target)

    def write(_: str, objects: list[str], **__: Any) -> None:
        files = [Path(o) for o in objects]
        if path.suffix != ".tar":
            cpu_target(triple).link(path, files)
            return
        with tarfile.open(path, "w") as archive:
            for file in files:
                info = tarfile.TarInfo(file.name)
                info.size = file.stat().st_size
                archive.addfile(info, io.BytesIO(file.read_bytes()))

    runtime.export_library(str(path), fcompile=write)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_kernels_of_a_library_are_read_by_its_symbol(name: str, tmp_path: Path) -> None:
    triple, kind, prefix = LIBRARIES[name]
    write_library(tmp_path / name, triple, kind, prefix)
    (module,) = library_code(tmp_path / name)
    code = module.device_code()
    assert module.kind == kind and code.format == {"opencl": "cl", "metal": "metal"}[kind]
    assert module.functions["add_kernel"].launch_tags == ("blockIdx.x", "threadIdx.x")
    assert code.arg_types == {"add_kernel": ("handle", "handle")}
    text = bytes(module.code or module.kernels["add_kernel"]).decode()
    assert "add_kernel" in text


def test_a_file_without_device_code_is_refused(tmp_path: Path) -> None:
    for name, content in (("text.so", b"hello"), ("empty.tar", b""), ("broken.tar", b"x" * 600)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError):
            library_code(tmp_path / name)


def blob_of_a_library(folder: Path) -> bytes:
    path = folder / "blob.tar"
    write_library(path, "x86_64-linux-gnu", "opencl", None)
    return write_blob(find_blob(path.read_bytes()))


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return blob_of_a_library(tmp_path_factory.mktemp("blob"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_blob_gives_an_error_and_nothing_else(blob: bytes, data: st.DataObject) -> None:
    """Cut anywhere, or with eight bytes of it replaced."""
    at = data.draw(st.integers(0, len(blob) - 8))
    new = data.draw(st.one_of(st.none(), st.binary(min_size=8, max_size=8)))
    damaged = blob[:at] if new is None else blob[:at] + new + blob[at + 8 :]
    try:
        modules = device_modules(damaged, "the test's blob")
    except ArtifactError:
        return
    assert all(isinstance(m.code, bytes) for m in modules)


def test_an_unknown_kind_of_module_is_named() -> None:
    from awq_compile.targets.vulkan.blob import Blob

    empty = (0).to_bytes(8, "little") * 3
    data = write_blob(Blob((0, 1, 1), (1,), (BlobModule("_lib", None), BlobModule("webgpu", empty))))
    with pytest.raises(ArtifactError, match="unknown kind 'webgpu'"):
        device_modules(data, "the test's blob")


def test_the_kernels_of_a_table_are_those_of_the_library() -> None:
    n = te.var("n", "int64")
    x = te.placeholder((n, 96), "float32", name="x")
    function = te.create_prim_func([x, tvm.topi.nn.softmax(x)]).with_attr("global_symbol", "softmax")
    built = hk.build(function, "opencl", "fallback")
    from awq_compile.verify.executors.opencl import split_kernels

    assert isinstance(built.code.code, str)
    assert sorted(kernels_of(built.tables["softmax"])) == sorted(split_kernels(built.code.code))
