"""CUDA without the toolkit: NVRTC and the headers from PyPI compile what nvcc would."""

from __future__ import annotations

import pytest
import tvm_ffi

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.targets import cuda, resolve_target

SOURCE = """
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
extern "C" __global__ void k(half* x) { x[threadIdx.x] = __hadd(x[threadIdx.x], x[0]); }
"""


def test_half_precision_compiles() -> None:
    """The headers are found, the result is machine code, and an error shows the compiler's words."""
    pytest.importorskip("cuda.bindings")
    assert cuda.nvrtc(SOURCE, "sm_80")[:4] == b"\x7fELF"
    with pytest.raises(CompileError, match=r"NVRTC refused the kernels for sm_80: (?s:.*)undefined_thing"):
        cuda.nvrtc(SOURCE.replace("__hadd", "undefined_thing"), "sm_80")


def test_an_incomplete_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bindings are there and the headers are not."""

    def absent(package: str) -> None:
        raise cuda.PackageNotFoundError(package)

    monkeypatch.setattr(cuda, "distribution", absent)
    with pytest.raises(EnvironmentMissingError, match="NVRTC is not complete") as caught:
        cuda.nvrtc(SOURCE, "sm_80")
    assert "pip install" in str(caught.value.hint)
    monkeypatch.setattr(cuda.shutil, "which", lambda _: None)
    with pytest.raises(EnvironmentMissingError, match="NVRTC is not complete"):
        resolve_target("cuda:sm_90").check_tools()
    with pytest.raises(EnvironmentMissingError, match="several architectures"):
        resolve_target("cuda:sm_80+sm_90").check_tools()


def test_an_error_of_the_compiler_comes_through_tvm_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM calls for machine code while it exports, and makes a RuntimeError of what is raised there."""
    target = resolve_target("cuda:sm_90")

    def refuse(self: object, data: bytes) -> bytes:
        raise CompileError("nvcc refused", hint="another nvcc")

    monkeypatch.setattr(cuda.CudaTarget, "with_machine_code", refuse)
    pack = tvm_ffi.get_global_func(cuda.PACK)
    with pytest.raises(CompileError, match="nvcc refused") as caught, target.building():
        tvm_ffi.get_global_func(cuda.PACK)(b"blob", False)
    assert caught.value.hint == "another nvcc"
    assert tvm_ffi.get_global_func(cuda.PACK).same_as(pack)
    with pytest.raises(RuntimeError, match="something else"), target.building():
        raise RuntimeError("something else")
