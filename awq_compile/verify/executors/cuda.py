"""CUDA machine code on an NVIDIA GPU: what a library carries, not the source beside it.

The driver lives in a child process, for a GPU that has met a fault is of no use to the process that caused it: the
next launch gets a new one. All arguments of a launch lie in one allocation, which is kept for the next launches:

    zone | array 0 | zone | array 1 | zone

Zones hold NaNs, which show in results that depend on them; a zone that has changed was written.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.verify.executors.base import (
    Argument,
    DeviceCode,
    KernelError,
    Size3,
    contiguous,
    described,
    distinct,
)
from awq_compile.verify.executors.child import Child, ChildLostError
from awq_compile.verify.executors.cuda_worker import DriverError, call

FORMATS: Final = ("cubin", "fatbin", "ptx")
ZONE_BYTES: Final = 1 << 16  # a row of the widest matrices
_ALIGNMENT: Final = 256  # of cuMemAlloc
_GRANULE: Final = 64 << 20  # by which the memory of arguments grows
# Bytes of which two are a NaN of float16, and four a NaN or a huge number of float32. Neighbouring zones have
# different ones: a kernel that copies from behind one array to behind another must be seen.
_NANS: Final = (0xFF, 0x7D, 0xFE, 0x7E, 0xFD, 0x7F)


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine. `index` is the driver's number of it."""

    index: int
    name: str
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.major}{self.minor})"

    def runs(self, arch: str) -> bool:
        """Whether it takes machine code for `arch`, `sm_80` for example.

        NVIDIA CUDA C++ Programming Guide, 'Binary Compatibility': the same major revision, and not a newer minor one.
        """
        major, minor = divmod(int(arch.removeprefix("sm_")), 10)
        return major == self.major and minor <= self.minor


def gpus() -> list[Gpu]:
    """The GPUs of this machine. Raises `EnvironmentMissingError` where there is none, or no driver."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise EnvironmentMissingError(
            "the package cuda-bindings is not installed", hint="pip install cuda-bindings"
        ) from None
    try:
        call(driver, "cuInit", 0)
        count = call(driver, "cuDeviceGetCount")
    except (DriverError, RuntimeError, OSError) as error:
        raise EnvironmentMissingError(f"there is no NVIDIA GPU with its driver: {error}") from None
    if not count:
        raise EnvironmentMissingError("the NVIDIA driver finds no GPU")
    attribute = driver.CUdevice_attribute
    which = [getattr(attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{one}") for one in ("MAJOR", "MINOR")]
    found = []
    for index in range(count):
        device = call(driver, "cuDeviceGet", index)
        name = bytes(call(driver, "cuDeviceGetName", 256, device)).partition(b"\0")[0].decode().strip()
        major, minor = (int(call(driver, "cuDeviceGetAttribute", one, device)) for one in which)
        found.append(Gpu(index, name, major, minor))
    return found


def find_gpu(archs: Sequence[str]) -> Gpu:
    """A GPU of this machine that takes machine code for one of `archs`. Raises `EnvironmentMissingError`."""
    found = gpus()
    for gpu in found:
        if any(gpu.runs(arch) for arch in archs):
            return gpu
    raise EnvironmentMissingError(f"{', '.join(map(str, found))} does not run machine code for {', '.join(archs)}")


def missing(archs: Sequence[str]) -> str | None:
    """Why machine code for `archs` cannot run here; None when it can."""
    try:
        find_gpu(archs)
    except EnvironmentMissingError as error:
        return str(error)
    return None


class CudaExecutor:
    """Runs machine code on a GPU. `seconds` are allowed for a launch."""

    def __init__(self, gpu: Gpu, *, seconds: float = 300.0) -> None:
        self.device = str(gpu)
        self.seconds = seconds
        self._gpu = gpu
        self._code: DeviceCode | None = None
        self._child: Child | None = None
        self._file = os.memfd_create("awq-compile-arguments")
        weakref.finalize(self, os.close, self._file)
        self._memory = np.empty(0, np.uint8)  # the whole file

    def load(self, code: DeviceCode) -> None:
        """Takes a cubin, a fatbin or PTX. Raises `CompileError` when the driver refuses it."""
        if code.format not in FORMATS:
            raise CompileError(f"a GPU runs machine code or PTX, not {code.format}")
        self.close()
        self._code = code
        self._started()

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        """See `Executor`. Raises `KernelError` on a stray write, a fault, or a kernel that never ends."""
        if self._code is None or kernel not in self._code.arg_types:
            raise KeyError(f"kernel {kernel} is not loaded")
        if 0 in grid:
            return
        arrays, slots = distinct(contiguous(kernel, args))
        starts, used = _layout(arrays)
        header = {
            "do": "launch",
            "kernel": kernel,
            "parameters": _parameters(kernel, self._code.arg_types[kernel], args, [starts[slot] for slot in slots]),
            "grid": [int(size) for size in grid],
            "block": [int(size) for size in block],
            "shared": dynamic_shared,
            "overlapping": kernel in self._code.overlapping,
            "used": used,
            "size": self._reserve(used),
        }
        zones = _zones(arrays, starts, used)
        for number, zone in enumerate(zones):
            self._memory[zone] = _NANS[number % len(_NANS)]
        for array, start in zip(arrays, starts, strict=True):
            self._memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._ask(kernel, header)
        for number, zone in enumerate(zones):
            if (changed := self._memory[zone] != _NANS[number % len(_NANS)]).any():
                raise KernelError(f"{kernel} writes {_place(arrays, number, changed)}")
        for array, start in zip(arrays, starts, strict=True):
            array.reshape(-1).view(np.uint8)[...] = self._memory[start : start + array.nbytes]

    def close(self) -> None:
        """Ends the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> Child:
        """The child, with the code loaded."""
        if self._child is None:
            assert self._code is not None
            code = self._code.code.encode() if isinstance(self._code.code, str) else self._code.code
            module = "awq_compile.verify.executors.cuda_worker"
            self._child = Child(module, [str(self._file)], pass_fds=[self._file])
            try:
                answer, _ = self._child.ask({"do": "load", "index": self._gpu.index}, [code], self.seconds)
            except ChildLostError as error:
                answer = {"error": f"the driver {error}"}
            if "error" in answer:
                self.close()
                raise CompileError(f"{self.device} does not take the {self._code.format}: {answer['error']}")
        return self._child

    def _ask(self, kernel: str, header: dict[str, Any]) -> None:
        try:
            answer, _ = self._started().ask(header, [], self.seconds)
        except ChildLostError as error:
            self._child = None
            raise KernelError(f"{kernel} {error}") from None
        if "error" in answer:
            self.close()
            raise KernelError(f"{kernel}: {answer['error']}")

    def _reserve(self, used: int) -> int:
        """Bytes of the file after making room for `used`."""
        if used > len(self._memory):
            size = -(-used // _GRANULE) * _GRANULE
            os.ftruncate(self._file, size)
            self._memory = np.frombuffer(mmap.mmap(self._file, size), np.uint8)
        return len(self._memory)


def _layout(arrays: Sequence[np.ndarray[Any, Any]]) -> tuple[list[int], int]:
    """Where each array starts, and the bytes of all: a zone before the first, and at least one behind each."""
    at, starts = ZONE_BYTES, []
    for array in arrays:
        starts.append(at)
        at += -(-(array.nbytes + ZONE_BYTES) // _ALIGNMENT) * _ALIGNMENT
    return starts, at


def _zones(arrays: Sequence[np.ndarray[Any, Any]], starts: Sequence[int], used: int) -> list[slice]:
    """What lies before the first array, and behind each."""
    ends = [start + array.nbytes for array, start in zip(arrays, starts, strict=True)]
    return [slice(a, b) for a, b in zip([0, *ends], [*starts, used], strict=True)]


def _place(arrays: Sequence[np.ndarray[Any, Any]], zone: int, changed: np.ndarray[Any, Any]) -> str:
    """Where the first changed byte of a zone is: by the nearer of the two arrays around it."""
    first = int(np.flatnonzero(changed)[0])
    if zone == len(arrays) > 0 or (zone and first < len(changed) // 2):
        return f"{first + 1} bytes behind buffer {zone - 1} {described(arrays[zone - 1])}"
    return f"{len(changed) - first} bytes before buffer {zone} {described(arrays[zone])}"


def _parameters(
    kernel: str, types: Sequence[str], args: Sequence[Argument], places: Sequence[int]
) -> list[tuple[str, int | float]]:
    """(type, value) in the kernel's order; an array's value is its place. Buffers and numbers each come in order."""
    numbers = [a for a in args if not isinstance(a, np.ndarray)]
    handles = types.count("handle")
    if (handles, len(types) - handles) != (len(places), len(numbers)):
        raise KernelError(
            f"{kernel} takes {handles} buffers and {len(types) - handles} scalars, and was given {len(places)} and "
            f"{len(numbers)}"
        )
    buffers, scalars = iter(places), iter(numbers)
    found: list[tuple[str, int | float]] = []
    for kind in types:
        if kind == "handle":
            found.append((kind, next(buffers)))
        else:
            found.append((kind, (float if kind.startswith("float") else int)(next(scalars))))
    return found
