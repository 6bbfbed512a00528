"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs, and waits for it.

A kernel that calls `awq_grid_wait` asks for it, `mma_gemv` and `wgmma_gemm` behind their first reads of weights. What
does not call it, of ours and of TVM's, gets it as its first statement and saves the time of a launch. TVM's runtime
launches so what has `TAG` among its launch tags (its spelling); the tag takes no argument, and the one of dynamic
shared memory stays last. From compute capability 9.0 on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from awq_compile.errors import ArtifactError
from awq_compile.targets.cuda_ptx import MOST_BUFFERS
from awq_compile.targets.vulkan.blob import FunctionInfo

TAG: Final = "tirx.use_programtic_dependent_launch"
_KERNEL: Final = re.compile(
    r'^extern "C" __global__ void[^;{}]*?\b(\w+)\(([^;{}()]*)\) *\{$(.*?)^\}', re.MULTILINE | re.DOTALL
)
_WAIT: Final = re.compile(r"^  awq_grid_wait\(", re.MULTILINE)  # not in a branch: every thread comes there


def with_waits(source: str) -> str:
    """TVM's CUDA C++ in which every kernel waits for those before it, unless it has more buffers than can be named."""

    def waiting(kernel: re.Match[str]) -> str:
        head, body = kernel[0][: kernel.start(3) - kernel.start()], kernel[3]
        buffers = [parameter.split()[-1].lstrip("*") for parameter in kernel[2].split(",") if "*" in parameter]
        if _WAIT.search(body) or len(buffers) > MOST_BUFFERS:
            return kernel[0]
        return f"{head}\n  awq_grid_launch_dependents();\n  awq_grid_wait({', '.join(buffers)});{body}}}"

    return _KERNEL.sub(waiting, source)


def waiting_kernels(source: str) -> frozenset[str]:
    """Names of the kernels in TVM's CUDA C++ that wait for those before them."""
    return frozenset(name for name, _, body in _KERNEL.findall(source) if _WAIT.search(body))


def overlapping_kernels(source: str, arch: str) -> frozenset[str]:
    """Those of them to be launched early, where `arch` is the oldest to run on."""
    return waiting_kernels(source) if int(arch.removeprefix("sm_")) >= 90 else frozenset()


def tagged(functions: Mapping[str, FunctionInfo], source: str, arch: str) -> dict[str, FunctionInfo]:
    """`functions` with the tag where their kernels are to be launched early."""
    early = overlapping_kernels(source, arch)
    return {
        name: replace(info, launch_tags=(TAG, *info.launch_tags)) if name in early else info
        for name, info in functions.items()
    }


def check_tags(functions: Mapping[str, FunctionInfo], source: str) -> None:
    """Raises `ArtifactError` for a kernel that would be launched early and does not wait."""
    tags = {name for name, info in functions.items() if TAG in info.launch_tags}
    if bad := sorted(tags - waiting_kernels(source)):
        raise ArtifactError(f"the library launches {bad[0]} while earlier kernels run, and its source does not wait")
