"""CUDA and Metal kernels on the CPU: compiled by zig against the headers in `simt_include`, one fibre per thread.

Every grid runs in several orders of threads and blocks, each on its own copy of the buffers. All must agree
bit for bit: a missing barrier makes them differ. A buffer lies against a page that nobody may touch, at its
end in one order and at its start in the next, with a watched gap on its other side.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from awq_compile.errors import CompileError
from awq_compile.verify.executors.base import (
    Argument,
    DeviceCode,
    KernelError,
    Size3,
    contiguous,
    described,
    distinct,
)
from awq_compile.verify.executors.guarded import GuardedBuffer, fiber_stacks
from awq_compile.verify.executors.simt_build import compile_shim
from awq_compile.verify.executors.simt_source import ShimSource, joined, shim_source

ORDERS: Final = ("ascending", "descending", "shuffled")
MAX_THREADS: Final = 1024
TOGETHER: Final = 16  # sources compiled at once: starting the compiler takes as long as three kernels
_FAULT, _DIVERGED, _TIMEOUT, _WARP_DIVERGED = 1, 2, 3, 4
_SCALARS: Final[dict[str, Any]] = {
    "b": ctypes.c_bool,
    "1": ctypes.c_int8,
    "2": ctypes.c_int16,
    "4": ctypes.c_int32,
    "8": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
_SIGNALS: Final = {
    4: "an array index out of bounds or a misaligned vector access",
    5: "an array index out of bounds or a misaligned vector access",
    7: "an access to memory that is not there",
    8: "an integer division by zero",
    11: "an access outside its buffers",
}
_lock = threading.Lock()  # the compiled shim's state is static


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class _Report(ctypes.Structure):
    """`awq_report` of awq_simt.h."""

    _fields_ = (
        ("outcome", ctypes.c_int32),
        ("signal", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("block", _Index),
        ("thread", _Index),
        ("other", _Index),
        ("line", ctypes.c_int32),
        ("other_line", ctypes.c_int32),
    )


class _Kernel(ctypes.Structure):
    """`awq_kernel` of awq_simt.h."""

    _fields_ = (
        ("body", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("shared_stop", ctypes.c_void_p),
        ("signature", ctypes.c_char_p),
    )


@dataclass(frozen=True)
class _Loaded:
    source: str
    library: ctypes.CDLL

    def kernel(self, name: str) -> _Kernel:
        return _Kernel.in_dll(self.library, f"awq_kernel_{name}")

    def quote(self, line: int) -> str:
        """Line `abs(line)` of the source, for messages."""
        lines = self.source.splitlines()
        return f"line {abs(line)}: {lines[abs(line) - 1].strip()}" if 0 < abs(line) <= len(lines) else f"line {line}"


class SimtExecutor:
    """Runs CUDA or Metal kernels on this CPU. `seconds` of CPU time are allowed for a grid in one order."""

    def __init__(self, *, orders: int = 3, seconds: float = 60.0) -> None:
        self.orders = orders
        self.seconds = seconds
        self._sources: dict[str, ShimSource] = {}
        self._texts: dict[str, str] = {}  # kernel → the source it is in
        self._libraries: dict[tuple[ShimSource, ...], ctypes.CDLL] = {}

    def load(self, code: DeviceCode) -> None:
        """Takes source code; it is compiled at the first launch, several kernels at once where each has its own."""
        if code.format not in ("cuda", "metal"):
            raise CompileError(f"the CPU shim runs CUDA and Metal sources, not {code.format}")
        self._sources, self._texts = {}, {}
        for text in list(code.kernels.values()) or [code.code]:
            source = text.decode("utf-8") if isinstance(text, bytes) else text
            translated = shim_source(code.format, source)
            self._sources |= dict.fromkeys(translated.kernels, translated)
            self._texts |= dict.fromkeys(translated.kernels, source)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels loaded."""
        return tuple(self._sources)

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        """See `Executor`. Raises `KernelError` on a race, a barrier that not all reach, or a stray access."""
        if kernel not in self._sources:
            raise KeyError(f"kernel {kernel} is not loaded")
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= MAX_THREADS:
            raise KernelError(f"{kernel}: a block of {threads} threads; at most {MAX_THREADS} are possible")
        if 0 in grid:
            return
        arrays, slots = distinct(contiguous(kernel, args))
        loaded = _Loaded(self._texts[kernel], self._compiled(kernel))
        results: list[list[np.ndarray[Any, Any]]] = []
        for order in range(self.orders):
            buffers = [GuardedBuffer(array, at_end=order != 1) for array in arrays]
            with _lock:
                addresses = [buffers[slot].address for slot in slots]
                self._run(loaded, kernel, args, buffers, addresses, grid, block, dynamic_shared, order)
            for number, buffer in enumerate(buffers):
                if (stray := buffer.stray()) is not None:
                    raise KernelError(f"{kernel} writes {stray} buffer {number} {described(arrays[number])}")
            results.append([buffer.array() for buffer in buffers])
            self._same(kernel, results[0], results[-1], order)
        for array, result in zip(arrays, results[0], strict=True):
            array[...] = result

    def _compiled(self, kernel: str) -> ctypes.CDLL:
        """The library that has the kernel, compiled together with its neighbours."""
        sources = list(dict.fromkeys(self._sources.values()))
        first = sources.index(self._sources[kernel]) // TOGETHER * TOGETHER
        group = tuple(sources[first : first + TOGETHER])
        if group not in self._libraries:
            self._libraries[group] = ctypes.CDLL(str(compile_shim(joined(group))))
        return self._libraries[group]

    def _run(
        self,
        loaded: _Loaded,
        name: str,
        args: Sequence[Argument],
        buffers: list[GuardedBuffer],
        addresses: list[int],
        grid: Size3,
        block: Size3,
        dynamic_shared: int,
        order: int,
    ) -> None:
        kernel = loaded.kernel(name)
        signature = bytes(kernel.signature).decode()
        values = _pack(name, signature, args, addresses)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        report = _Report()
        loaded.library.awq_launch(
            ctypes.byref(kernel),
            ctypes.c_void_p(fiber_stacks()),
            pointers,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_uint(dynamic_shared),
            ctypes.c_int(order),
            ctypes.c_uint(order),
            ctypes.c_double(self.seconds),
            ctypes.byref(report),
        )
        if report.outcome:
            raise KernelError(f"{name}: {self._explain(loaded, report, buffers)}")

    def _explain(self, loaded: _Loaded, report: _Report, buffers: list[GuardedBuffer]) -> str:
        who = f"thread {report.thread} of block {report.block}"
        if report.outcome == _TIMEOUT:
            return f"{who} is still running after {self.seconds:g} s"
        if report.outcome == _FAULT:
            near = [(n, p) for n, b in enumerate(buffers) if (p := b.position(report.address)) is not None]
            where = f", {near[0][1]} buffer {near[0][0]}" if near else ""
            return f"{_SIGNALS.get(report.signal, f'signal {report.signal}')}{where}, by {who}"
        other = f"thread {report.other}"
        there = f"is at {loaded.quote(report.other_line)}" if report.other_line else "has finished"
        what = "barrier" if report.outcome == _DIVERGED else "warp operation"
        return f"{who} waits in a {what} at {loaded.quote(report.line)}; {other} {there}"

    def _same(self, kernel: str, first: list[Any], other: list[Any], order: int) -> None:
        for number, (a, b) in enumerate(zip(first, other, strict=True)):
            differs = a.view(np.uint8) != b.view(np.uint8) if a.size else np.zeros(1, bool)
            if differs.any():
                index = int(np.flatnonzero(differs)[0]) // a.itemsize
                raise KernelError(
                    f"{kernel} races: element {index} of buffer {number} {described(a)} is {a.flat[index]} with "
                    f"threads in {ORDERS[0]} order and {b.flat[index]} in {ORDERS[min(order, 2)]} order"
                )


def _pack(name: str, signature: str, args: Sequence[Argument], addresses: list[int]) -> list[Any]:
    """One ctypes value per parameter. Metal's scalars go together into a struct of 8-byte slots."""
    scalars = [a for a in args if not isinstance(a, np.ndarray)]
    if any(not isinstance(a, np.ndarray) for a in args[: len(addresses)]):
        raise KernelError(f"{name}: buffers come before scalars in a kernel's arguments")
    kinds = signature.rstrip("gt") if set(signature) & set("gst") else signature
    wanted = kinds.count("p")
    if wanted != len(addresses) or ("s" not in kinds and len(kinds) - wanted != len(scalars)):
        raise KernelError(
            f"{name} takes {wanted} buffers and {len(kinds) - wanted} scalars, and was given {len(addresses)} "
            f"and {len(scalars)}"
        )
    values: list[Any] = [ctypes.c_void_p(address) for address in addresses]
    if "s" in kinds:
        slots = (ctypes.c_int64 * max(1, len(scalars)))()
        for i, scalar in enumerate(scalars):
            where = ctypes.addressof(slots) + 8 * i
            if isinstance(scalar, float):
                ctypes.c_float.from_address(where).value = scalar
            else:
                slots[i] = int(scalar)
        values.append(slots)
    else:
        values += [_scalar(kind, scalar) for kind, scalar in zip(kinds[wanted:], scalars, strict=True)]
    values += [ctypes.c_int64(0)] * (len(signature) - len(values))  # positions: computed by the shim
    return values


def _scalar(kind: str, value: Any) -> Any:
    if kind == "h":
        return ctypes.c_uint16(int(np.float16(value).view(np.uint16)))
    return _SCALARS[kind](float(value) if kind in "fd" else int(value))
