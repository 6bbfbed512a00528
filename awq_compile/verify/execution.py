"""Which executor runs the code of a target on this machine, and loading it there."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from awq_compile.errors import ArtifactError, EnvironmentMissingError
from awq_compile.models.config import ModelConfig
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cuda import CudaTarget
from awq_compile.targets.cuda_launch import check_tags
from awq_compile.verify.device_code import DeviceModule
from awq_compile.verify.executors import cuda
from awq_compile.verify.executors.base import Argument, DeviceCode, KernelError, Size3
from awq_compile.verify.reorder import has_barrier_opencl, reversed_opencl, reversed_spirv, rotated_spirv

if TYPE_CHECKING:
    from awq_compile.targets.vulkan.spirv.shader import Shader

# Of the largest matrix that the main job verifies; the shim of CUDA and Metal is some fifty times slower.
_ELEMENTS: Final = {"opencl": 1 << 28, "vulkan": 1 << 28, "cuda": 1 << 22, "metal": 1 << 22}


@dataclass(frozen=True)
class Loaded:
    """Device code, ready to run on `device`."""

    device: str
    run: Callable[[str, Sequence[Argument], Size3, Size3, int], None]

    def launch(self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, dynamic_shared: int = 0) -> None:
        """See `Executor.launch`."""
        self.run(kernel, args, grid, block, dynamic_shared)


@contextmanager
def load(
    modules: Sequence[DeviceModule], source: str, target: TargetSpec, seconds: float = 300.0, *, orders: bool = True
) -> Iterator[Loaded]:
    """Loads a library's modules (of one kind) into the executor of the target's kind.

    `source` is CUDA C++, which stands for machine code where no GPU runs that; `seconds` are allowed for a launch; with
    `orders`, OpenCL and Vulkan kernels run again with their threads renumbered. Raises `EnvironmentMissingError` naming
    what to install.
    """
    kind = str(target.tvm_target["kind"])
    if len(modules) != 1 or modules[0].kind != kind:
        found = ", ".join(module.kind for module in modules) or "none"
        raise ArtifactError(f"the library for {target.name} has device modules of the kinds {found}, expected {kind}")
    module = modules[0]
    if kind == "cuda":
        check_tags(module.functions, source)
    if kind == "opencl":
        yield from _opencl(module, seconds, orders)
    elif kind == "vulkan":
        yield from _vulkan(module, orders)
    elif (gpu := cuda_gpu(target)) is not None and module.format in cuda.FORMATS:
        yield from _cuda(module, gpu, seconds)
    elif kind in ("cuda", "metal"):
        yield from _simt(module, source, seconds)
    else:
        raise ArtifactError(f"nothing here runs the kernels of {kind}")


def missing(target: TargetSpec) -> str | None:
    """Why the kernels of a target cannot be executed here; None when they can."""
    kind = str(target.tvm_target["kind"])
    try:
        if kind == "opencl":
            from awq_compile.verify.executors import opencl

            if (reason := opencl.missing()) is not None:
                return reason
        elif kind == "vulkan":
            from awq_compile.verify.executors.vulkan import VulkanExecutor

            VulkanExecutor().close()
        elif cuda_gpu(target) is None:
            import ziglang  # noqa: F401
    except EnvironmentMissingError as error:
        return f"{error}; {error.hint}" if error.hint else str(error)
    except ImportError as error:
        return f"the package {error.name} is not installed; pip install {error.name}"
    return None


def cuda_gpu(target: TargetSpec) -> cuda.Gpu | None:
    """The GPU of this machine that runs the machine code of libraries for `target`; None where there is none."""
    try:
        return cuda.find_gpu(target.archs) if isinstance(target, CudaTarget) else None
    except EnvironmentMissingError:
        return None


def device_words(target: TargetSpec) -> str:
    """What runs the kernels of a target here, for people; `missing` says whether something does."""
    if isinstance(target, CudaTarget):
        gpu, reason = cuda_gpu(target), cuda.missing(target.archs)
        return f"machine code on {gpu}" if gpu else f"source on this CPU: {reason}"
    return "source on this CPU" if target.tvm_target["kind"] == "metal" else "this machine's driver"


def unbuildable(target: TargetSpec) -> str | None:
    """What building for a target needs and this machine has not; None where all is there."""
    if importlib.util.find_spec("ziglang") is None:
        return "the package ziglang is not installed; pip install ziglang"
    if target.tvm_target["kind"] != "cuda" or shutil.which("nvcc"):
        return None
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "neither nvcc nor NVRTC is there; pip install nvidia-cuda-nvrtc cuda-bindings"
    return None


def too_slow(config: ModelConfig, target: TargetSpec) -> str | None:
    """Why executing all kernels would take longer than a few minutes on a CPU; None when it would not."""
    if cuda_gpu(target) is not None:
        return None
    widest = max(config.vocab_size, 2 * config.intermediate_size)
    elements, limit = widest * config.hidden_size, _ELEMENTS[str(target.tvm_target["kind"])]
    if elements <= limit:
        return None
    return f"a matrix of {elements / 1e6:.0f} million elements takes long here"


def _opencl(module: DeviceModule, seconds: float, orders: bool) -> Iterator[Loaded]:
    from awq_compile.verify.executors.opencl import OpenCLExecutor, split_kernels

    units = split_kernels(bytes(module.code).decode())
    shared = {name: text for name, text in units.items() if orders and has_barrier_opencl(text)}
    executor, backwards = OpenCLExecutor(seconds=seconds), OpenCLExecutor(seconds=seconds)
    executor.load(module.device_code())
    backwards.load(DeviceCode("cl", kernels={name: reversed_opencl(text) for name, text in shared.items()}))
    executor._start()

    def run(kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, dynamic: int) -> None:
        def on(which: OpenCLExecutor) -> Callable[[Any], None]:
            return lambda arguments: which.launch(kernel, arguments, grid, block, dynamic_shared=dynamic)

        # Not bit for bit: the driver contracts multiplications and additions as it finds them.
        _in_all_orders(kernel, args, on(executor), [on(backwards)] if kernel in shared else [], exact=False)

    try:
        yield Loaded(executor.device, run)
    finally:
        executor.close()
        backwards.close()


def _vulkan(module: DeviceModule, orders: bool) -> Iterator[Loaded]:
    from awq_compile.verify.executors.vulkan import VulkanExecutor

    shaders = {name: _shader(name, module) for name in module.kernels}
    others: dict[str, list[str]] = {name: [] for name in shaders}
    renumbered = {}
    for name, shader in shaders.items():
        for how in (reversed_spirv, rotated_spirv) if orders else ():
            if (words := how(shader.words, shader.local_size)) is not None:
                key = f"{name}.{how.__name__}"
                others[name].append(key)
                renumbered[key] = replace(shader, words=words)
    with VulkanExecutor() as executor:
        executor.load({**shaders, **renumbered})

        def run(kernel: str, args: Sequence[Any], grid: Size3, block: Size3, _: int) -> None:
            def one(name: str) -> Callable[[Any], None]:
                return lambda arguments: executor.launch(name, arguments, grid, block)

            _in_all_orders(kernel, args, one(kernel), [one(name) for name in others.get(kernel, [])])

        yield Loaded(executor.info.name, run)


def _shader(name: str, module: DeviceModule) -> Shader:
    from awq_compile.targets.vulkan.spirv.shader import Shader

    data = bytes(module.kernels[name])
    if len(data) < 12 or len(data) != 12 + 4 * (count := struct.unpack_from("<Q", data, 4)[0]):
        raise ArtifactError(f"the shader {name} is damaged: {len(data)} bytes")
    (flag,) = struct.unpack_from("<I", data)
    return Shader(name, module.functions[name].arguments, flag, struct.unpack_from(f"<{count}I", data, 12))


def _in_all_orders(
    kernel: str,
    args: Sequence[Argument],
    run: Callable[[Any], None],
    others: Sequence[Callable[[Any], None]],
    *,
    exact: bool = True,
) -> None:
    """Runs a kernel in place, and on copies with its threads renumbered: all must leave the same bytes.

    Without `exact`, floating-point numbers may differ in their last bits.
    """
    copies: dict[int, Argument] = {id(a): a.copy() if isinstance(a, np.ndarray) else a for a in args} if others else {}
    run(args)
    for other in others:
        fresh = {key: a.copy() if isinstance(a, np.ndarray) else a for key, a in copies.items()}
        again = [fresh[id(a)] for a in args]
        other(again)
        for number, (first, second) in enumerate(zip(args, again, strict=True)):
            if isinstance(first, np.ndarray) and not _same(first, np.asarray(second), exact):
                raise KernelError(f"{kernel} races: with its threads numbered otherwise, buffer {number} differs")


def _same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], exact: bool) -> bool:
    if one.tobytes() == other.tobytes():
        return True
    if exact or one.dtype.kind != "f":
        return False
    slack = 8 * float(np.finfo(np.float16).eps)  # float32 results come of values that were rounded to float16
    return bool(np.isclose(one.astype(np.float64), other, rtol=slack, atol=slack, equal_nan=True).all())


def _cuda(module: DeviceModule, gpu: cuda.Gpu, seconds: float) -> Iterator[Loaded]:
    with cuda.CudaExecutor(gpu, seconds=seconds) as executor:
        executor.load(module.device_code())
        yield Loaded(executor.device, lambda k, a, g, b, s: executor.launch(k, a, g, b, dynamic_shared=s))


def _simt(module: DeviceModule, source: str, seconds: float) -> Iterator[Loaded]:
    from awq_compile.verify.executors.simt import SimtExecutor

    executor = SimtExecutor(seconds=seconds)
    if module.kind == "cuda":
        if not source:
            raise ArtifactError("the library has CUDA machine code, and its source is not beside it")
        executor.load(DeviceCode("cuda", source))
    else:
        executor.load(module.device_code())
    absent = sorted(set(module.functions) - set(executor.kernels))
    if absent:
        raise ArtifactError(f"the source has no kernel {absent[0]}, and the library has")
    yield Loaded(
        f"{module.kind} source on this CPU", lambda k, a, g, b, s: executor.launch(k, a, g, b, dynamic_shared=s)
    )
