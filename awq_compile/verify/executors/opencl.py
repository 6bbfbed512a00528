"""OpenCL kernels through any driver: a GPU's, or Intel's CPU runtime from PyPI.

The driver lives in a child process: which drivers there are is decided by environment variables that must
stand before a process starts, and a kernel that crashes or never ends takes only the child with it.
Buffers lie between watched zones; what is written there is reported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

import numpy as np

from awq_compile import settings
from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.verify.executors.base import Argument, DeviceCode, KernelError, Size3, contiguous
from awq_compile.verify.executors.child import Answer, Child, ChildLostError

_HINT: Final = "for any CPU: pip install pyopencl intel-opencl-rt intel-cmplr-lib-rt"
_VENDORS: Final = Path("/etc/OpenCL/vendors")
_MARKER: Final = "// Function: "
_TYPES: Final = {
    "bool": "uint8",
    "char": "int8",
    "uchar": "uint8",
    "short": "int16",
    "ushort": "uint16",
    "int": "int32",
    "uint": "uint32",
    "long": "int64",
    "ulong": "uint64",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}


class OpenCLExecutor:
    """Runs OpenCL C. `prefer` is the type of device to take where there are several: `gpu` or `cpu`.

    `seconds` are allowed for a launch, compiling included.
    """

    def __init__(self, *, prefer: str = "gpu", seconds: float = 300.0) -> None:
        self.prefer = prefer
        self.seconds = seconds
        self._kernels: dict[str, str] = {}
        self._child: Child | None = None
        self.device = ""

    def load(self, code: DeviceCode) -> None:
        """Takes OpenCL C; a kernel is compiled at its first launch."""
        if code.format != "cl":
            raise CompileError(f"the OpenCL executor runs OpenCL C, not {code.format}")
        text = code.code.decode("utf-8") if isinstance(code.code, bytes) else code.code
        self._kernels = {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in code.kernels.items()}
        self._kernels |= split_kernels(text)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels loaded."""
        return tuple(self._kernels)

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        """See `Executor`. Raises `KernelError` on a stray write, a crash of the driver or a kernel that never ends."""
        if kernel not in self._kernels:
            raise KeyError(f"kernel {kernel} is not loaded")
        if dynamic_shared:
            raise KernelError(f"{kernel}: OpenCL has no dynamic shared memory")
        if 0 in grid:
            return
        arrays = contiguous(kernel, args)
        numbers = [a for a in args if not isinstance(a, np.ndarray)]
        header = {
            "do": "launch",
            "kernel": kernel,
            "source": self._kernels[kernel],
            "scalars": [float(n) if isinstance(n, float | np.floating) else int(n) for n in numbers],
            "types": scalar_types(kernel, self._kernels[kernel]),
            "global": [g * b for g, b in zip(grid, block, strict=True)],
            "local": list(block),
        }
        answer, data = self._ask(kernel, header, [a.reshape(-1).view(np.uint8).data for a in arrays])
        if "error" in answer:
            kind = CompileError if answer.get("compile") else KernelError
            raise kind(f"{kernel}: {answer['error']}")
        for array, new in zip(arrays, data, strict=True):
            array.reshape(-1).view(np.uint8)[...] = np.frombuffer(new, np.uint8)

    def close(self) -> None:
        """Ends the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, what: str, header: dict[str, Any], blobs: Sequence[Any]) -> Answer:
        try:
            return self._start().ask(header, blobs, self.seconds)
        except ChildLostError as error:
            self._child = None
            raise KernelError(f"{what} {error}") from None

    def _start(self) -> Child:
        if self._child is None:
            self._child = Child("awq_compile.verify.executors.opencl_worker", environment=driver_environment())
            answer, _ = self._ask("the search for devices", {"do": "open", "prefer": self.prefer}, [])
            if "error" in answer:
                self.close()
                raise EnvironmentMissingError(f"OpenCL is not usable here: {answer['error']}", hint=_HINT)
            self.device = answer["device"]
        return self._child


def split_kernels(text: str) -> dict[str, str]:
    """TVM writes one translation unit per kernel, each behind a comment with its name: kernel → its unit."""
    parts = text.split(_MARKER)[1:]
    return {name.strip(): body for name, _, body in (part.partition("\n") for part in parts)}


def scalar_types(kernel: str, source: str) -> list[str]:
    """NumPy's names of the types of a kernel's scalar parameters, read from its definition."""
    match = re.search(rf"\b{re.escape(kernel)}\s*\(([^(){{}};]*)\)\s*\{{", source)
    if match is None:
        raise CompileError(f"the OpenCL source does not define {kernel} in a form that is understood")
    scalars = [p.split() for p in match[1].split(",") if p.strip() and "*" not in p]
    return [_TYPES[words[-2]] for words in scalars]


def driver_environment(*, lockstep: bool = False) -> dict[str, str]:
    """The environment in which the ICD loader finds the system's drivers and, where installed, Intel's from PyPI.

    Left to itself, which is what is timed, Intel's CPU runtime runs 16 threads of a block in lockstep, and that hides
    a missing barrier.
    """
    environment = settings.environment()
    if not lockstep:
        environment.setdefault("CL_CONFIG_CPU_VECTORIZER_MODE", "1")
    given = environment.get("OCL_ICD_VENDORS")
    folders = [Path(given)] if given else [_VENDORS]
    drivers = {p.name: p.read_text(encoding="utf-8") for f in folders if f.is_dir() for p in sorted(f.glob("*.icd"))}
    if (intel := _intel_runtime()) is not None:
        drivers = {n: t for n, t in drivers.items() if "libintelocl" not in t}  # the package's own names a wrong path
        drivers["intel-pypi.icd"] = f"{intel}\n"
        before = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{intel.parent}:{before}" if before else str(intel.parent)
    if drivers:
        key = hashlib.sha256(repr(sorted(drivers.items())).encode()).hexdigest()[:16]
        folder = settings.cache_folder("opencl", key)
        for name, text in drivers.items():
            (folder / name).write_text(text, encoding="utf-8")
        environment["OCL_ICD_VENDORS"] = str(folder)
    return environment


def _intel_runtime() -> Path | None:
    """libintelocl.so of the PyPI package `intel-opencl-rt`; None where it is not installed."""
    try:
        files = distribution("intel-opencl-rt").files or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(f.locate())).resolve() for f in files if f.name == "libintelocl.so"]
    return next((p.parent / "libintelocl.so" for p in paths if p.is_file()), None)


def missing() -> str | None:
    """Why OpenCL cannot run here; None when it can."""
    executor = OpenCLExecutor(prefer="cpu", seconds=60.0)
    try:
        executor._start()
    except (EnvironmentMissingError, KernelError) as error:
        return str(error)
    finally:
        executor.close()
    return None
