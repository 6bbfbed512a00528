"""Kernels that start before the one ahead has ended wait for it before they touch what it may have written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tvm

from awq_compile.errors import ArtifactError, CompileError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.build import bucket_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import MatrixGemvSchedule, StagedMatrixSchedule, WarpgroupSchedule
from awq_compile.targets import resolve_target
from awq_compile.targets.cuda import CudaTarget, with_device_functions
from awq_compile.targets.cuda_launch import TAG, check_tags, waiting_kernels, with_waits
from awq_compile.targets.vulkan.blob import (
    Blob,
    BlobModule,
    FunctionInfo,
    parse_blob,
    parse_opencl_payload,
    write_blob,
    write_code_payload,
)

PROBLEM = MatmulProblem(40, 512, QuantSpec(4, 128, False), Epilogue(bias=True, residual=True), "float16")
KERNELS = (
    ("gemv", MatrixGemvSchedule(2)),
    ("gemv", MatrixGemvSchedule(1, 2, 1, 3, 4)),
    ("pair", MatrixGemvSchedule(1, 2)),
    ("quad", MatrixGemvSchedule(2)),
    ("small", MatrixGemvSchedule(3, 2, 1, 2)),
    ("medium", MatrixGemvSchedule(2, 2, 2, 3)),
    ("gemm", StagedMatrixSchedule(2, 1, 4)),
    ("wide", WarpgroupSchedule(1, 2, 8, 2)),
    ("gemm", WarpgroupSchedule(2, 2, 16, stages=4)),
    ("large", WarpgroupSchedule(1, 1, 4, ahead=2)),
    ("large", WarpgroupSchedule(1, 1, 4, ahead=4)),
)
KERNEL = re.compile(r"__global__ [^;{}]*\(([^;{}()]*)\) \{$(.*?)^\}", re.MULTILINE | re.DOTALL)
WAIT = re.compile(r"^  awq_grid_wait\(.*\n", re.MULTILINE)
DYNAMIC = "tirx.use_dyn_shared_memory"


def cuda_source(bucket: str, schedule: Any) -> str:
    """CUDA C++ of one kernel."""
    target = tvm.target.Target(resolve_target("cuda:sm_90").tvm_target)
    function = bucket_linear(PROBLEM, bucket, schedule).with_attr("global_symbol", "linear")
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return str(tvm.tirx.build(tvm.IRModule({"linear": function}), target=target).imports[0].inspect_source("cuda"))


def too_early(source: str) -> list[list[str]]:
    """Of each kernel the buffers that it uses before it waits, without those of W: they are parameters."""
    kernels = KERNEL.findall(source)
    buffers = [set(re.findall(r"\w+_ptr\b", parameters)) for parameters, _ in kernels]
    assert {"x_ptr", "y_ptr", "residual_ptr"} <= set().union(*buffers)
    found = []
    for mine, (_, body) in zip(buffers, kernels, strict=True):
        before = set(re.findall(r"\w+", WAIT.split(body)[0]))
        assert "return" not in before
        found.append(sorted(name for name in mine & before if not name.startswith("q_")))
    return found


@pytest.mark.parametrize(("bucket", "schedule"), KERNELS, ids=str)
def test_what_a_kernel_calls_is_there(bucket: str, schedule: Any) -> None:
    """Every device function of ours that the source calls is put in front of it."""
    source = cuda_source(bucket, schedule)
    called = set(re.findall(r"\bawq_\w+", source))
    defined = set(re.findall(r"__forceinline__ void (awq_\w+)\(", with_device_functions(source, "sm_90")))
    assert called and called <= defined


@pytest.mark.parametrize(("bucket", "schedule"), KERNELS, ids=str)
def test_nothing_that_earlier_kernels_write_is_touched_before_the_wait(bucket: str, schedule: Any) -> None:
    """Nor does a thread leave before it. A wait that comes too late, or not to all threads, is seen."""
    source = cuda_source(bucket, schedule)
    count = 2 if isinstance(schedule, WarpgroupSchedule) else 1  # x is arranged first
    assert waiting_kernels(source) == set(["linear_kernel", "linear_kernel_1"][:count])
    assert too_early(source) == [[]] * count
    waits, end = WAIT.findall(source), source.rindex("\n}")
    assert len(waits) == count
    late = source[:end].replace(waits[-1], "") + "\n" + waits[-1].rstrip() + source[end:]
    read = "x_ptr" if count == 1 else "arranged_ptr"
    assert sorted(too_early(late)[-1]) == sorted(["bias_ptr", "residual_ptr", read, "y_ptr"])
    for wait in waits:
        branched = source.replace(wait, f"  if (threadIdx.x == 0) {{\n  {wait}  }}\n")
        assert len(waiting_kernels(branched)) == count - 1


def test_resident_blocks_are_a_launch_bound() -> None:
    """Of the kernel that asks for them alone, where it is declared and where it is defined."""
    source = cuda_source("gemv", MatrixGemvSchedule(1, 2, 1, 3, 4))
    other = source.replace("linear_kernel", "other_kernel").replace("  awq_resident<4>();\n", "")
    bounds = re.findall(r"__launch_bounds__\(([^)]*)\) (\w+)", with_device_functions(source + other, "sm_90"))
    assert bounds == [("32, 4", "linear_kernel")] * 2 + [("32", "other_kernel")] * 2
    with pytest.raises(CompileError, match="no launch bound"):
        with_device_functions(source.replace("__launch_bounds__(32) ", ""), "sm_90")


@pytest.mark.parametrize(("archs", "early"), [("sm_90", True), ("sm_100+sm_120", True), ("sm_80+sm_90", False)])
def test_kernels_wait_first_and_are_tagged_at_export(archs: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one with too many buffers, where the oldest architecture knows of it.

    What the host passes for dynamic shared memory stays last. Ours keep the place of their wait.
    """
    many = ", ".join(f"float* __restrict__ p{i}_ptr" for i in range(17))
    source = "".join(
        f'extern "C" __global__ void __launch_bounds__(32) {name}({buffers}){end}'
        for name, buffers, body in (
            ("ours", "float* __restrict__ y_ptr", "  float w = 0;\n  awq_grid_wait(y_ptr);\n"),
            ("second", "const half* __restrict__ x_ptr, float* __restrict__ y_ptr, int n", "  y_ptr[0] = x_ptr[0];\n"),
            ("third", many, "  p0_ptr[0] = 1;\n"),
        )
        for end in (";\n", f" {{\n{body}}}\n")
    )
    tags = ("blockIdx.x", "threadIdx.x", DYNAMIC)
    functions = {name: FunctionInfo(name, ("handle",), tags) for name in ("ours", "second", "third")}
    monkeypatch.setattr(CudaTarget, "machine_code", lambda self, text: (text.encode(), "fatbin"))
    target = resolve_target(f"cuda:{archs}")
    assert isinstance(target, CudaTarget)
    module = BlobModule("cuda", write_code_payload("cuda", functions, source.encode()))
    (made,) = parse_blob(target.with_machine_code(write_blob(Blob((0, 0), (), (module,))))).modules
    assert made.payload is not None
    found, _ = parse_opencl_payload(made.payload)
    assert {name: info.launch_tags for name, info in found.items()} == {
        "ours": (TAG, *tags) if early else tags,
        "second": (TAG, *tags) if early else tags,
        "third": tags,
    }
    text = with_waits(source)
    assert re.findall(r"\{\n  (awq_grid_launch.*\n.*)", text) == [
        "awq_grid_launch_dependents();\n  awq_grid_wait(x_ptr, y_ptr);"
    ]
    assert text.count("awq_grid_wait(") == 2 and "w = 0;\n  awq_grid_wait(y_ptr);\n}" in text
    check_tags(found, text)
    if early:
        with pytest.raises(ArtifactError, match="launches ours while earlier kernels run"):
            check_tags(found, text.replace("awq_grid_wait", "awq_grid"))
