"""`CudaExecutor` against a GPU that is not there: its driver's functions, on memory of this process."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.targets import resolve_target
from awq_compile.targets.vulkan.blob import FunctionInfo
from awq_compile.verify import execution
from awq_compile.verify.device_code import DeviceModule
from awq_compile.verify.executors import cuda
from awq_compile.verify.executors.base import DeviceCode, KernelError
from awq_compile.verify.executors.cuda_worker import Worker

H200 = cuda.Gpu(0, "NVIDIA H200", 9, 0)
BASE = 0x7F00_0000_0000  # of the GPU's memory
NO_DEVICE, ILLEGAL_ADDRESS = 100, 700
TYPES = {"handle": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
Kernel = Callable[..., None]


class Driver:
    """`cuda.bindings.driver` of a machine with one H200. Kernels are Python functions of it and their arguments."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUlaunchConfig = SimpleNamespace
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, kernels: dict[str, tuple[tuple[str, ...], Kernel]]) -> None:
        self.kernels = kernels
        self.memory = np.empty(0, np.uint8)
        self.status = 0
        self.launched: list[Any] = []
        self.attributes: list[int] = []
        self.early = 0

    def CUlaunchAttribute(self) -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace())

    def at(self, address: int, count: int, dtype: Any = np.float32) -> Any:
        """A view of the GPU's memory."""
        start = address - BASE
        return self.memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, 1

    def cuDeviceGet(self, index: int) -> tuple[int, str]:
        return 0, f"device {index}"

    def cuDeviceGetName(self, length: int, device: str) -> tuple[int, bytes]:
        return 0, b"NVIDIA H200\0".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: str) -> tuple[int, int]:
        return 0, {75: 9, 76: 0}[attribute]

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[int, str]:
        return 0, "context"

    def cuCtxSetCurrent(self, context: str) -> tuple[int]:
        return (0,)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        return (0, "module") if code == b"machine code\0" else (200, None)

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        return 0, name.decode()

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[int]:
        self.attributes.append(value)
        return (0,)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        self.memory = np.zeros(size, np.uint8)
        return 0, BASE

    def cuMemFree(self, address: int) -> tuple[int]:
        self.memory = np.empty(0, np.uint8)
        return (0,)

    def cuMemcpyHtoD(self, target: int, source: int, count: int) -> tuple[int]:
        ctypes.memmove(self.memory.ctypes.data + target - BASE, source, count)
        return (self.status,)

    def cuMemcpyDtoH(self, target: int, source: int, count: int) -> tuple[int]:
        ctypes.memmove(target, self.memory.ctypes.data + source - BASE, count)
        return (self.status,)

    def cuLaunchKernel(self, function: str, *rest: int) -> tuple[int]:
        *sizes, stream, parameters, extra = rest
        assert (stream, extra) == (0, 0)
        types, run = self.kernels[function]
        pointers = (ctypes.c_void_p * len(types)).from_address(parameters)
        values = [TYPES[kind].from_address(p).value for kind, p in zip(types, pointers, strict=True)]  # type: ignore[attr-defined]
        self.launched.append((function, sizes, values))
        run(self, *values)
        return (0,)

    def cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> tuple[int]:
        (attribute,) = config.attrs
        assert config.numAttrs == attribute.value.programmaticStreamSerializationAllowed == 1 and attribute.id == 6
        self.early += 1
        grid, block = (config.gridDimX, config.gridDimY, config.gridDimZ), (config.blockDimX, config.blockDimY)
        sizes = (*grid, *block, config.blockDimZ, config.sharedMemBytes)
        return self.cuLaunchKernel(function, *sizes, 0, parameters, extra)

    def cuCtxSynchronize(self) -> tuple[int]:
        return (self.status,)

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, {ILLEGAL_ADDRESS: b"an illegal memory access was encountered"}.get(code, b"an error")

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return 0, {ILLEGAL_ADDRESS: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(code, b"CUDA_ERROR")


class Gpu:
    """An executor and the drivers that its child processes held, the last one last."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kernels: dict[str, tuple[tuple[str, ...], Kernel]], *early: str
    ) -> None:
        self.drivers: list[Driver] = []
        gpu = self

        class InProcess:
            def __init__(self, module: str, arguments: list[str], *, pass_fds: list[int]) -> None:
                gpu.drivers.append(Driver(kernels))
                self.worker = Worker(gpu.drivers[-1], int(arguments[0]))

            def ask(self, header: Any, blobs: list[bytes], seconds: float) -> Any:
                return self.worker.answer(json.loads(json.dumps(header)), blobs)

            def close(self) -> None:
                pass

        monkeypatch.setattr(cuda, "Child", InProcess)
        types = {name: kinds for name, (kinds, _) in kernels.items()}
        self.executor = cuda.CudaExecutor(H200)
        self.executor.load(DeviceCode("fatbin", b"machine code", {}, types, frozenset(early)))

    def launch(self, kernel: str, *args: Any, shared: int = 0) -> None:
        self.executor.launch(kernel, args, (2, 1, 1), (32, 1, 1), dynamic_shared=shared)


def scale(driver: Driver, x: int, n: int, y: int, factor: float, count: int) -> None:
    driver.at(y, count)[...] = driver.at(x, count) * factor + n


SCALE = (("handle", "int32", "handle", "float32", "int64"), scale)


def test_arguments_arrive_in_the_kernels_order_with_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """And results come back, of arrays that need more memory than the ones before too."""
    monkeypatch.setattr(cuda, "_GRANULE", 1 << 20)
    gpu = Gpu(monkeypatch, {"scale": SCALE})
    for count in (5, 1 << 19):
        x, y = np.arange(count, dtype=np.float32), np.full(count, np.nan, np.float32)
        gpu.launch("scale", x, y, -3, 0.5, count)
        np.testing.assert_array_equal(y, x * np.float32(0.5) - 3)
    (driver,) = gpu.drivers
    function, sizes, values = driver.launched[0]
    assert (function, sizes) == ("scale", [2, 1, 1, 32, 1, 1, 0])
    assert values[1] == -3 and values[3:] == [0.5, 5]
    assert all(value % 256 == 0 for value in (values[0], values[2]))
    with pytest.raises(KernelError, match="takes 2 buffers and 3 scalars, and was given 2 and 1"):
        gpu.launch("scale", x, y, 1)


def test_one_array_given_twice_is_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrays of equal content are two."""
    gpu = Gpu(monkeypatch, {"scale": SCALE})
    x, other = np.ones(4, np.float32), np.ones(4, np.float32)
    gpu.launch("scale", x, x, 1, 1.0, 4)
    gpu.launch("scale", x, other, 0, 1.0, 4)
    np.testing.assert_array_equal(x, np.full(4, 2, np.float32))
    same, apart = ([values[0], values[2]] for _, _, values in gpu.drivers[0].launched)
    assert same[0] == same[1] and apart[0] != apart[1]


def test_what_lies_beside_an_array_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As half and as single precision, or so large that it shows."""
    seen: list[Any] = []

    def look(driver: Driver, x: int, y: int) -> None:
        seen.extend([driver.at(x - 8, 4, np.float16), driver.at(y + 16, 4, np.float16), driver.at(x + 16, 2)])

    gpu = Gpu(monkeypatch, {"look": (("handle", "handle"), look)})
    gpu.launch("look", np.zeros(4, np.float32), np.zeros(4, np.float32))
    assert np.isnan(seen[0]).all() and np.isnan(seen[1]).all()
    assert not (np.abs(seen[2]) < 1e37).any()


@pytest.mark.parametrize(
    ("number", "offset", "words"),
    [
        (0, 16, "1 bytes behind buffer 0 (4 float32)"),
        (1, -1, "1 bytes before buffer 1 (4 float32)"),
        (1, 20, "5 bytes behind buffer 1 (4 float32)"),
        (0, -4, "4 bytes before buffer 0 (4 float32)"),
    ],
)
def test_a_stray_write_is_reported(monkeypatch: pytest.MonkeyPatch, number: int, offset: int, words: str) -> None:
    """With its place; the arrays stay as they were."""

    def stray(driver: Driver, x: int, y: int) -> None:
        driver.at(x, 4)[...] = 7
        driver.at((x, y)[number] + offset, 1, np.uint8)[...] = 0

    gpu = Gpu(monkeypatch, {"stray": (("handle", "handle"), stray)})
    x = np.zeros(4, np.float32)
    with pytest.raises(KernelError) as caught:
        gpu.launch("stray", x, np.zeros(4, np.float32))
    assert str(caught.value) == f"stray writes {words}"
    assert not x.any()


def test_a_copy_from_behind_one_array_to_behind_the_next_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zones differ."""

    def copy(driver: Driver, x: int, y: int) -> None:
        driver.at(y, 5)[...] = driver.at(x, 5)

    gpu = Gpu(monkeypatch, {"copy": (("handle", "handle"), copy)})
    with pytest.raises(KernelError, match="behind buffer 1"):
        gpu.launch("copy", np.zeros(4, np.float32), np.zeros(4, np.float32))


def test_after_a_fault_the_next_kernel_runs_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the driver's words."""

    def fault(driver: Driver, x: int) -> None:
        driver.status = ILLEGAL_ADDRESS

    gpu = Gpu(monkeypatch, {"fault": (("handle",), fault), "scale": SCALE})
    x, y = np.ones(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(KernelError, match=r"fault: an illegal memory access .*\(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        gpu.launch("fault", x)
    gpu.launch("scale", x, y, 0, 2.0, 4)
    assert len(gpu.drivers) == 2 and (y == 2).all()


def test_much_shared_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 48 KiB on, and every time."""
    gpu = Gpu(monkeypatch, {"scale": SCALE})
    for shared in (1024, 64 << 10):
        gpu.launch("scale", np.ones(4, np.float32), np.ones(4, np.float32), 0, 1.0, 4, shared=shared)
    assert gpu.drivers[0].attributes == [64 << 10]
    assert [sizes[-1] for _, sizes, _ in gpu.drivers[0].launched] == [1024, 64 << 10]


def test_a_kernel_is_launched_early_where_the_runtime_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same sizes and arguments."""
    for early, count in ((["scale"], 1), ([], 0)):
        gpu = Gpu(monkeypatch, {"scale": SCALE}, *early)
        x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
        gpu.launch("scale", x, y, 1, 2.0, 4, shared=96)
        np.testing.assert_array_equal(y, 2 * x + 1)
        assert gpu.drivers[0].early == count and gpu.drivers[0].launched[0][1] == [2, 1, 1, 32, 1, 1, 96]


def test_a_driver_that_is_absent_or_refuses_the_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The former in a real child process."""
    with pytest.raises(CompileError, match=r"NVIDIA H200 \(sm_90\) does not take the cubin: "):
        cuda.CudaExecutor(H200).load(DeviceCode("cubin", b"anything"))
    gpu = Gpu(monkeypatch, {})
    with pytest.raises(CompileError, match="does not take the ptx: an error"):
        gpu.executor.load(DeviceCode("ptx", "something else"))
    with pytest.raises(CompileError, match="not cuda"):
        gpu.executor.load(DeviceCode("cuda", "source"))


def bindings(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    """Makes `from cuda.bindings import driver` give `driver`; None for a machine without the package."""
    package: Any = ModuleType("cuda.bindings")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None if driver is None else package)


def test_a_gpu_runs_code_of_its_own_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an older one's machine code, not a newer one's."""
    bindings(monkeypatch, Driver({}))
    assert cuda.find_gpu(["sm_80", "sm_90"]) == H200
    assert cuda.missing(["sm_90"]) is None
    for archs in (["sm_80"], ["sm_100"], ["sm_80", "sm_100"]):
        assert cuda.missing(archs) == f"NVIDIA H200 (sm_90) does not run machine code for {', '.join(archs)}"
    laptop = cuda.Gpu(0, "a laptop's", 8, 6)
    assert [laptop.runs(arch) for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")] == [0, 1, 1, 0, 0]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, the driver, the device."""
    bindings(monkeypatch, None)
    assert cuda.missing(["sm_90"]) == "the package cuda-bindings is not installed"
    driver = Driver({})
    bindings(monkeypatch, driver)
    monkeypatch.setattr(driver, "cuDeviceGetCount", lambda: (0, 0))
    assert cuda.missing(["sm_90"]) == "the NVIDIA driver finds no GPU"
    monkeypatch.setattr(driver, "cuInit", lambda _: (NO_DEVICE,))
    assert str(cuda.missing(["sm_90"])).startswith("there is no NVIDIA GPU with its driver: an error (CUDA_ERROR)")

    def absent(_: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuInit", absent)
    with pytest.raises(EnvironmentMissingError, match=r"Failed to dlopen libcuda\.so\.1"):
        cuda.gpus()


def test_machine_code_is_verified_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size; source alone stays on the CPU, as does code for another GPU."""
    gpu = Gpu(monkeypatch, {"scale": SCALE})
    bindings(monkeypatch, Driver({}))
    target = resolve_target("cuda:sm_80+sm_90")
    huge: Any = SimpleNamespace(vocab_size=1 << 18, intermediate_size=1 << 15, hidden_size=1 << 13)
    assert execution.too_slow(huge, target) is None and execution.too_slow(huge, resolve_target("cuda:sm_80"))
    assert execution.device_words(target) == "machine code on NVIDIA H200 (sm_90)"
    monkeypatch.setitem(sys.modules, "ziglang", None)
    assert execution.missing(target) is None
    assert "ziglang" in str(execution.missing(resolve_target("cuda:sm_80")))
    module = DeviceModule("cuda", "fatbin", {"scale": FunctionInfo("scale", SCALE[0], (), ())}, b"machine code")
    x, y = np.ones(4, np.float32), np.zeros(4, np.float32)
    with execution.load([module], "", target) as loaded:
        assert loaded.device == "NVIDIA H200 (sm_90)"
        loaded.launch("scale", [x, y, 1, 1.0, 4], (1, 1, 1), (32, 1, 1))
    assert (y == 2).all() and len(gpu.drivers) == 2
