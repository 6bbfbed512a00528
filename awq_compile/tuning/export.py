"""A candidate as a file that the TVM runtime of another machine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq_compile.errors import CompileError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.link import library_suffix
from awq_compile.tuning.candidate import build
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.measure import Work


def kernel_suffix(spec: TargetSpec) -> str:
    """Of a library with one kernel. Raises `CompileError` for systems that nothing is linked for here."""
    if (suffix := library_suffix(spec.host)) == ".tar":
        raise CompileError(f"kernels for {spec.name} cannot be measured elsewhere: nothing here links for {spec.host}")
    return suffix


def export_kernel(work: Work, candidate: Candidate, spec: TargetSpec, path: Path) -> None:
    """Builds and links a candidate; `path` has the suffix `kernel_suffix`. Raises what TVM and the linker raise."""
    module = build(work, candidate, spec).module

    def link(output: str, objects: list[str], **_: Any) -> None:
        spec.link(Path(output), sorted(Path(name) for name in objects))

    with spec.building():  # CUDA's code becomes machine code as it is written
        module.export_library(str(path), fcompile=link)
