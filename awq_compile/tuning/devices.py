"""The devices of this machine: its CPU in this process, OpenCL devices through their driver, others through TVM."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from awq_compile.errors import EnvironmentMissingError
from awq_compile.runtime.lean_tvm import tvm
from awq_compile.runtime.threads import use_threads
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cpu import CpuTarget
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.candidate import KERNEL, build
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.inputs import Inputs
from awq_compile.tuning.measure import Work
from awq_compile.tuning.peaks import cpu_roof, opencl_roof
from awq_compile.tuning.runtime_device import RuntimeDevice
from awq_compile.tuning.timing import Device, Kernel, last_level_cache_bytes
from awq_compile.verify.executors.base import DeviceCode, Size3
from awq_compile.verify.executors.opencl import scalar_types, split_kernels
from awq_compile.verify.launch_table import Table, run_prim_func


def open_device(spec: TargetSpec) -> Device:
    """What runs the kernels of a target here. Raises `EnvironmentMissingError` where nothing does."""
    kind = str(spec.tvm_target["kind"])
    if kind == "llvm" and spec.runs_here:
        return CpuDevice(spec)
    if kind == "opencl":
        return OpenCLDevice(spec)
    return RuntimeDevice(spec)


class CpuDevice:
    """Kernels compiled into this process, with as many threads as our runtime uses."""

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec
        threads = use_threads()
        self.fingerprint = Fingerprint(_cpu_name(), "cpu", f"{spec.machine}, {threads} threads", threads)
        self.copies = 1
        self._inputs: Inputs | None = None
        self._x: Any = None
        self._weights: list[list[Any]] = []
        self._rest: list[Any] = []

    def roof(self) -> Roof:
        """See `Device`."""
        return _roof_of_this_cpu()

    def prepare(self, inputs: Inputs) -> None:
        """See `Device`."""
        tensor = tvm.runtime.tensor
        self._inputs = inputs
        self._weights = []  # the last work's copies go before the next ones come
        self.copies = inputs.copies(2 * last_level_cache_bytes())
        self._weights = [[tensor(array) for array in inputs.weight] for _ in range(self.copies)]
        self._x = tensor(inputs.x)
        self._rest = [tensor(array) for array in (*inputs.extra, inputs.output())]

    def load(self, work: Work, candidate: Candidate) -> Kernel:
        """See `Device`."""
        assert self._inputs is not None and self._inputs.work == work, work
        built = build(work, candidate, self.spec)
        return CpuKernel(built.module[KERNEL], self._inputs, self._x, self._weights, self._rest)


@dataclass(frozen=True)
class CpuKernel:
    """See `Kernel`; times are the caller's."""

    function: Any
    inputs: Inputs
    x: Any
    weights: list[list[Any]]
    rest: list[Any]

    def poison(self) -> None:
        """See `Kernel`."""
        self.rest[-1].copyfrom(self.inputs.output())

    def run(self, copy: int, *, cold: bool) -> float:
        """See `Kernel`."""
        weight = self.weights[copy]
        start = time.perf_counter()
        self.function(self.x, *weight, *self.rest)
        return time.perf_counter() - start

    def wrong(self) -> str:
        """See `Kernel`."""
        return self.inputs.wrong(self.rest[-1].numpy(), self.x.numpy())


class OpenCLDevice:
    """OpenCL C compiled by the driver; a GPU is preferred. Times are the device's own, without the launch."""

    def __init__(self, spec: TargetSpec) -> None:
        import pyopencl as cl

        self.spec = spec
        devices = [d for p in cl.get_platforms() for d in p.get_devices()]
        if not devices:
            raise EnvironmentMissingError("no OpenCL driver offers a device", hint="awq-compile doctor")
        device = max(devices, key=lambda d: bool(d.type & cl.device_type.GPU))
        kind = "gpu" if device.type & cl.device_type.GPU else "cpu"
        driver = f"OpenCL {device.driver_version}"
        self.fingerprint = Fingerprint(str(device.name).strip(), kind, driver, device.max_compute_units)
        self._cache = max(int(device.global_mem_cache_size), last_level_cache_bytes() if kind == "cpu" else 0, 4 << 20)
        self.context = cl.Context([device])
        profiling = cl.command_queue_properties.PROFILING_ENABLE
        self.queue = cl.CommandQueue(self.context, properties=profiling)
        self.copies = 1
        self._arguments: OpenCLArguments | None = None

    def roof(self) -> Roof:
        """See `Device`. An OpenCL device that is this machine's CPU reaches what the CPU does, its runtime less."""
        if self.fingerprint.kind == "cpu":
            return _roof_of_this_cpu()
        return opencl_roof(self.context, self.queue, self._cache, self.fingerprint.units)

    def prepare(self, inputs: Inputs) -> None:
        """See `Device`."""
        self._arguments = None  # the last work's buffers go before the next ones come
        self.copies = inputs.copies(2 * self._cache)
        # One array here stands for all copies: its view's identity is the key of a buffer on the device.
        weights = [[array.view() for array in inputs.weight] for _ in range(self.copies)]
        self._arguments = OpenCLArguments(inputs, weights, inputs.output(), DeviceArrays(self.context))
        for array in (inputs.x, *(a for copy in weights for a in copy), *inputs.extra, self._arguments.y):
            self._arguments.arrays.keep(array)

    def load(self, work: Work, candidate: Candidate) -> Kernel:
        """See `Device`."""
        arguments = self._arguments
        assert arguments is not None and arguments.inputs.work == work, work
        built = build(work, candidate, self.spec)
        assert built.table is not None
        executor = TimingExecutor(self.context, self.queue, arguments.arrays)
        executor.load(DeviceCode("cl", built.source))
        return OpenCLKernel(built.table, executor, arguments)


@dataclass
class DeviceArrays:
    """Buffers on the device by the identity of arrays here, which are kept alive for it."""

    context: Any
    kept: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    passing: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # temporaries of one run

    def keep(self, array: np.ndarray[Any, Any]) -> None:
        """Copies an array to the device, for good."""
        self.kept[id(array)] = (array, self._made(array))

    def buffer(self, array: np.ndarray[Any, Any]) -> Any:
        """The array's buffer."""
        if (found := self.kept.get(id(array)) or self.passing.get(id(array))) is None:
            found = self.passing[id(array)] = (array, self._made(array))
        return found[1]

    def _made(self, array: np.ndarray[Any, Any]) -> Any:
        import pyopencl as cl

        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        return cl.Buffer(self.context, flags, hostbuf=array)


@dataclass(frozen=True)
class OpenCLArguments:
    """What all kernels of one work are run with."""

    inputs: Inputs
    weights: list[list[Any]]
    y: Any
    arrays: DeviceArrays


@dataclass
class TimingExecutor:
    """An `Executor` that leaves arrays on the device, and adds up the time of launches."""

    context: Any
    queue: Any
    arrays: DeviceArrays
    nanoseconds: int = 0
    kernels: dict[str, tuple[Any, list[str]]] = field(default_factory=dict)  # with the types of its numbers

    def load(self, code: DeviceCode) -> None:
        """Compiles all kernels."""
        import pyopencl as cl

        for name, source in split_kernels(str(code.code)).items():
            loaded = cl.Kernel(cl.Program(self.context, source).build(), name)
            self.kernels[name] = loaded, scalar_types(name, source)

    def launch(self, kernel: str, args: Sequence[Any], grid: Size3, block: Size3, *, dynamic_shared: int = 0) -> None:
        """Runs a grid and waits."""
        import pyopencl as cl

        assert not dynamic_shared, kernel
        loaded, types = self.kernels[kernel]
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        numbers = [np.dtype(kind).type(n) for kind, n in zip(types, args[len(arrays) :], strict=True)]
        for i, value in enumerate([*map(self.arrays.buffer, arrays), *numbers]):
            loaded.set_arg(i, value)
        sizes = [g * b for g, b in zip(grid, block, strict=True)]
        event = cl.enqueue_nd_range_kernel(self.queue, loaded, sizes, list(block))
        event.wait()
        self.nanoseconds += event.profile.end - event.profile.start


@dataclass(frozen=True)
class OpenCLKernel:
    """See `Kernel`."""

    table: Table
    executor: TimingExecutor
    arguments: OpenCLArguments

    def poison(self) -> None:
        """See `Kernel`."""
        import pyopencl as cl

        a = self.arguments
        cl.enqueue_copy(self.executor.queue, a.arrays.buffer(a.y), a.inputs.output())

    def run(self, copy: int, *, cold: bool) -> float:
        """See `Kernel`."""
        a = self.arguments
        self.executor.nanoseconds = 0
        run_prim_func(self.table, self.executor, [a.inputs.x, *a.weights[copy], *a.inputs.extra, a.y])
        a.arrays.passing.clear()
        return self.executor.nanoseconds * 1e-9

    def wrong(self) -> str:
        """See `Kernel`."""
        import pyopencl as cl

        a = self.arguments
        y, x = np.empty_like(a.y), np.empty_like(a.inputs.x)
        for array, at in ((y, a.y), (x, a.inputs.x)):
            cl.enqueue_copy(self.executor.queue, array, a.arrays.buffer(at))
        return a.inputs.wrong(y, x)


def _roof_of_this_cpu() -> Roof:
    from awq_compile.targets import resolve_target

    spec = resolve_target("cpu")
    assert isinstance(spec, CpuTarget)
    return cpu_roof(spec, use_threads(), last_level_cache_bytes())


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()
