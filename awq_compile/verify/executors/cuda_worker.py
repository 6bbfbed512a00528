"""The child process that holds CUDA's driver: see `child`.

    python -m awq_compile.verify.executors.cuda_worker FD

FD is a file in memory, where the parent lays out the arguments of a launch: they go to the GPU and come back as one.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any, Final

from awq_compile.verify.executors.child import Answer, serve

STATIC_SHARED_BYTES: Final = 48 << 10  # a launch with more must ask for it, as TVM's runtime does
_SCALARS: Final[dict[str, Any]] = {
    "bool": ctypes.c_bool,
    "int8": ctypes.c_int8,
    "int16": ctypes.c_int16,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint8": ctypes.c_uint8,
    "uint16": ctypes.c_uint16,
    "uint32": ctypes.c_uint32,
    "uint64": ctypes.c_uint64,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}


class DriverError(Exception):
    """A function of the driver failed; says which error."""


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """A function of `cuda.bindings.driver`: its one result, or None. Raises `DriverError`."""
    code, *results = getattr(driver, name)(*arguments)
    if int(code):
        (_, words), (_, symbol) = driver.cuGetErrorString(code), driver.cuGetErrorName(code)
        raise DriverError(f"{(words or b'').decode()} ({(symbol or str(int(code)).encode()).decode()})")
    return results[0] if results else None


class Worker:
    """One GPU, one module, and one allocation for the arguments of any launch."""

    def __init__(self, driver: Any, fd: int) -> None:
        self._driver, self._fd = driver, fd
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        self._arena: Any = None
        self._map: mmap.mmap | None = None
        self._host = 0

    def answer(self, request: dict[str, Any], blobs: list[bytes]) -> Answer:
        """`load` with the code, and `launch`."""
        try:
            if request["do"] == "load":
                self._load(request["index"], blobs[0])
            else:
                self._launch(request)
        except DriverError as error:
            return {"error": str(error)}, []
        return {"done": True}, []

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(self._driver, name, *arguments)

    def _load(self, index: int, code: bytes) -> None:
        self._call("cuInit", 0)
        context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", index))
        self._call("cuCtxSetCurrent", context)
        self._module = self._call("cuModuleLoadData", code + b"\0")  # PTX is a string

    def _launch(self, request: dict[str, Any]) -> None:
        """`parameters` are (type, value): an array's value is its place in the file."""
        self._reserve(request["size"])
        function, shared = self._function(request["kernel"]), request["shared"]
        if shared >= STATIC_SHARED_BYTES:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, shared)
        values = [self._parameter(kind, value) for kind, value in request["parameters"]]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        self._call("cuMemcpyHtoD", self._arena, self._host, request["used"])
        if request["overlapping"]:
            config = self._overlapping(request["grid"], request["block"], shared)
            self._call("cuLaunchKernelEx", config, function, ctypes.addressof(pointers), 0)
        else:
            sizes = (*request["grid"], *request["block"], shared)
            self._call("cuLaunchKernel", function, *sizes, 0, ctypes.addressof(pointers), 0)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH", self._host, self._arena, request["used"])

    def _overlapping(self, grid: list[int], block: list[int], shared: int) -> Any:
        """How TVM's runtime launches a kernel that may start before the one ahead of it has ended."""
        config, attribute = self._driver.CUlaunchConfig(), self._driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared
        attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _reserve(self, size: int) -> None:
        """Memory here and on the GPU for all of the file."""
        if self._map is not None and len(self._map) == size:
            return
        if self._arena is not None:
            self._call("cuMemFree", self._arena)
            self._arena = None
        self._map = mmap.mmap(self._fd, size)
        self._host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        try:
            self._arena = self._call("cuMemAlloc", size)
        except DriverError as error:
            raise DriverError(f"the GPU has no {size / 1e6:.0f} MB for its arguments: {error}") from None

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._call("cuModuleGetFunction", self._module, name.encode())
        return self._functions[name]

    def _parameter(self, kind: str, value: Any) -> Any:
        if kind == "handle":
            return ctypes.c_uint64(int(self._arena) + value)
        return _SCALARS[kind](value)


def main() -> None:
    """Serves until stdin closes."""
    from cuda.bindings import driver

    serve(Worker(driver, int(sys.argv[1])).answer)


if __name__ == "__main__":
    main()
