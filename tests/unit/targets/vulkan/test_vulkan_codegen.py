"""Registration, the exported blob, and what happens to other targets in the same process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from helpers_vulkan import executor, vulkan_target
from tvm import te
from tvm.s_tir import dlight

from awq_compile.errors import ArtifactError, CompileError
from awq_compile.targets.vulkan import blob
from awq_compile.targets.vulkan.codegen import BUILD, PACK, vulkan_codegen


def _scaled(a: Any, factor: float) -> Any:
    return lambda i: a[i] * factor


def module_of(*factors: float) -> Any:
    """A module with one scheduled kernel per factor, for any GPU: b = a * factor."""
    functions = {}
    for k, factor in enumerate(factors):
        a = te.placeholder((te.var("n"),), "float32", name="a")
        b = te.compute(a.shape, _scaled(a, factor), name="b")
        functions[f"scale{k}"] = te.create_prim_func([a, b]).with_attr("global_symbol", f"scale{k}")
    with vulkan_target():
        return dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule(functions))


def export(module: Any, target: Any, path: Path) -> bytes:
    tvm.compile(module, target=target).export_library(str(path))
    return path.read_bytes()


def opencl_target() -> Any:
    return tvm.target.Target("opencl", host={"kind": "llvm", "mtriple": "x86_64-linux-gnu"})


def test_the_exported_library_holds_the_shaders(tmp_path: Path) -> None:
    """The blob of an exported library parses to a Vulkan module with every shader, and writes back unchanged."""
    with vulkan_codegen() as session:
        data = export(module_of(2.0, 3.0), vulkan_target(), tmp_path / "x.so")
    found = blob.find_blob(data)
    assert [m.kind for m in found.modules] == ["_lib", "vulkan"]
    payload = found.modules[1].payload
    assert payload is not None
    functions, shaders = blob.parse_vulkan_payload(payload)
    assert shaders == session.shaders
    assert set(functions) == {"scale0_kernel", "scale1_kernel"}
    assert functions["scale0_kernel"].launch_tags == ("blockIdx.x", "threadIdx.x")
    assert functions["scale0_kernel"].arguments == ("handle", "handle", "int32")
    assert blob.write_vulkan_payload(functions, shaders) == payload
    written = blob.write_blob(found)
    assert written in data
    assert blob.parse_blob(written) == found
    device, a = executor(), np.arange(300, dtype="float32")
    device.load(shaders)  # as they came out of the library
    b = np.zeros_like(a)
    device.launch("scale1_kernel", [a, b, 300], (2, 1, 1))
    np.testing.assert_array_equal(b, a * 3)


def test_equal_inputs_give_equal_libraries(tmp_path: Path) -> None:
    """Two builds of one module are equal byte for byte, whatever was built between them."""
    libraries = []
    for name, between in (("a", None), ("b", 5.0)):
        if between is not None:
            export(module_of(between), opencl_target(), tmp_path / "between.so")
        with vulkan_codegen():
            libraries.append(blob.find_blob(export(module_of(2.0), vulkan_target(), tmp_path / f"{name}.so")))
    assert libraries[0] == libraries[1]


def test_several_builds_in_one_session(tmp_path: Path) -> None:
    """Kernels of one name from two builds are not mixed up, in whatever order they are exported."""
    with vulkan_codegen():
        built = [tvm.compile(module_of(factor), target=vulkan_target()) for factor in (2.0, 7.0)]
        found = []
        for k in (1, 0):
            built[k].export_library(str(tmp_path / f"{k}.so"))
            payload = blob.find_blob((tmp_path / f"{k}.so").read_bytes()).modules[1].payload
            found.append(blob.parse_vulkan_payload(payload or b"")[1]["scale0_kernel"])
    a = np.ones(10, "float32")
    for shader, factor in zip(found, (7, 2), strict=True):
        b = np.zeros_like(a)
        executor().load({shader.name: shader})
        executor().launch(shader.name, [a, b, 10], (1, 1, 1))
        np.testing.assert_array_equal(b, np.full(10, factor))


def test_other_targets_are_untouched(tmp_path: Path) -> None:
    """Within a block an OpenCL library is the same as outside, and the block leaves TVM as it found it."""
    before = tvm_ffi.get_global_func(PACK)
    plain = blob.find_blob(export(module_of(2.0), opencl_target(), tmp_path / "a.so"))
    with vulkan_codegen():
        export(module_of(2.0), vulkan_target(), tmp_path / "v.so")
        inside = blob.find_blob(export(module_of(2.0), opencl_target(), tmp_path / "b.so"))
    assert inside == plain
    assert [m.kind for m in plain.modules] == ["_lib", "opencl"]
    assert tvm_ffi.get_global_func(BUILD, allow_missing=True) is None
    assert tvm_ffi.get_global_func(PACK).same_as(before)


def test_a_generator_that_tvm_brings_is_preferred() -> None:
    """Ours steps back for another unless asked to replace it, and brings the other back afterwards."""
    theirs = tvm_ffi.register_global_func(BUILD, lambda *_: None)
    try:
        with vulkan_codegen() as session:
            assert not session.uses_own_generator
        with vulkan_codegen(replace=True) as session:
            assert session.uses_own_generator
            tvm.compile(module_of(2.0), target=vulkan_target())
        assert session.shaders
        assert tvm_ffi.get_global_func(BUILD, allow_missing=True) is not None
        with vulkan_codegen() as session:
            assert not session.uses_own_generator
    finally:
        tvm_ffi.remove_global_func(BUILD)
        del theirs


def test_errors_come_out_as_ours() -> None:
    """What the generator refuses is a `CompileError` at the end of the block, and TVM is left clean."""
    module, message = module_of(2.0), "scale0_kernel uses 256 threads in a block, the target has 128"
    with pytest.raises(CompileError, match=message) as raised, vulkan_codegen():
        tvm.compile(module, target=vulkan_target(max_threads_per_block=128))
    assert "max_threads_per_block" in str(raised.value.hint)
    assert tvm_ffi.get_global_func(BUILD, allow_missing=True) is None


def test_damaged_blobs_are_refused(tmp_path: Path) -> None:
    """A blob cut short, with a wrong size or a wrong tree is an `ArtifactError`, never another exception."""
    with vulkan_codegen():
        data = export(module_of(2.0), vulkan_target(), tmp_path / "x.so")
    good = blob.write_blob(blob.find_blob(data))
    payload = blob.parse_blob(good).modules[1].payload or b""
    for bad in (good[:-1], good[:40], good + b"x", b"\xff" * 64, good[:8] + b"\x09" + good[9:]):
        with pytest.raises(ArtifactError):
            blob.parse_blob(bad)
    for bad in (payload[:-3], payload + b"x", payload[:20]):
        with pytest.raises(ArtifactError):
            blob.parse_vulkan_payload(bad)
    with pytest.raises(ArtifactError, match="no device code"):
        blob.find_blob(b"\x7fELF" + bytes(1000))
