"""What the executors share: device code, the protocol, and what a launch can find wrong.

An executor compiles device code once and runs its kernels on arrays of this process:

    executor = SimtExecutor()
    executor.load(DeviceCode("cuda", source))
    executor.launch("add_kernel", [a, b, c, 1000], grid=(4, 1, 1), block=(256, 1, 1))     # c is written in place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from awq_compile.errors import AwqCompileError

Argument = np.ndarray[Any, Any] | int | float
Size3 = tuple[int, int, int]


class KernelError(AwqCompileError):
    """A kernel did what it must not: left its buffers, raced, or disagreed about a barrier."""


@dataclass(frozen=True)
class DeviceCode:
    """Code of one device module. `format` is `cuda`, `metal`, `cl` or `vulkan`.

    `code` holds all kernels, or is empty where each has its own in `kernels`. `arg_types` maps a kernel to
    its parameters' types as `DLDataType` writes them (`handle`, `int64`, `float32`); executors that find
    them in the code do not need it. `overlapping`: kernels that TVM's runtime launches before those ahead of them have
    ended (`targets.cuda_launch`).
    """

    format: str
    code: str | bytes = ""
    kernels: Mapping[str, str | bytes] = field(default_factory=dict)
    arg_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    overlapping: frozenset[str] = frozenset()


class Executor(Protocol):
    """Runs kernels. `load` replaces what was loaded before."""

    def load(self, code: DeviceCode) -> None:
        """Takes device code; kernels may be compiled as late as at their first launch."""

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        """Runs one grid. Arrays are updated in place; numbers become the scalars that the kernel declares."""


def contiguous(kernel: str, args: Sequence[Argument]) -> list[np.ndarray[Any, Any]]:
    """The arrays among `args`; each must be C-contiguous and writable, for it is updated in place."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    for array in arrays:
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError(f"{kernel}: an array of shape {array.shape} is not contiguous and writable")
    return arrays


def distinct(arrays: Sequence[np.ndarray[Any, Any]]) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    """The arrays without those given twice, and which of them each is: a kernel may work in place."""
    slots: dict[tuple[int, int], int] = {}
    found: list[np.ndarray[Any, Any]] = []
    at: list[int] = []
    for array in arrays:
        key = (array.ctypes.data, array.nbytes)
        if key not in slots:
            slots[key] = len(found)
            found.append(array)
        at.append(slots[key])
    return found, at


def described(array: np.ndarray[Any, Any]) -> str:
    """Shape and type, for messages."""
    return f"({'x'.join(map(str, array.shape))} {array.dtype})"
