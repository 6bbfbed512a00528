"""What the vendors' own tools say of emitted code, without a device: `spirv-val`, and ptxas through nvcc."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.targets.cuda import machine_archs, with_device_functions
from awq_compile.verify.device_code import DeviceModule

_ENTRY: Final = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILLS: Final = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS: Final = re.compile(r"Used (\d+) registers")
_HEADER_BYTES: Final = 12  # of a shader in the blob: flag and number of words


@dataclass(frozen=True)
class Resources:
    """What ptxas gave one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int


def spirv_errors(module: DeviceModule, environment: str = "vulkan1.2") -> list[str]:
    """What `spirv-val` finds in the shaders of a Vulkan module, one line per bad shader."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shader.spv"
        for name, code in sorted(module.kernels.items()):
            path.write_bytes(code[_HEADER_BYTES:])
            done = _run(["spirv-val", "--target-env", environment, str(path)], "apt-get install spirv-tools")
            if done.returncode:
                found.append(f"{name}: {(done.stderr or done.stdout).strip()[:300]}")
    return found


def cuda_resources(source: str, archs: Sequence[str]) -> list[Resources]:
    """Registers and spilled bytes of every kernel of CUDA C++, by ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.cu"
        code.write_text(with_device_functions(source, archs[0]), encoding="utf-8")
        targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in machine_archs(source, tuple(archs))]
        command = ["nvcc", "-fatbin", "-O3", "-std=c++17", "-Xptxas", "-v", *targets, "-o", f"{folder}/out", str(code)]
        done = _run(command, "install the CUDA toolkit")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompileError(f"nvcc refused the kernels for {', '.join(archs)}: {' '.join(errors)[:2000]}")
    found = []
    kernel = arch = ""
    spilled = 0
    for line in done.stderr.splitlines():
        if match := _ENTRY.search(line):
            kernel, arch = match.groups()
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif kernel and (match := _REGISTERS.search(line)):
            found.append(Resources(kernel, arch, int(match[1]), spilled))
            kernel = ""
    return found


def _run(command: list[str], hint: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise EnvironmentMissingError(f"{command[0]} is not on PATH", hint=hint) from None
