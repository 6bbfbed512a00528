"""The device code inside a built library, whatever the library's format: ELF, Mach-O, PE, COFF, or a tar of objects.

The exporter leaves one symbol, `__tvm_ffi__library_bin` (behind the system-lib prefix), with TVM's module
blob; `awq_compile.targets.vulkan.blob` has its layout. Object formats are read by lief. Nothing is trusted:
a size that does not fit stops with `ArtifactError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from awq_compile.contract.objects import module_blob
from awq_compile.errors import ArtifactError
from awq_compile.targets.cuda_launch import TAG
from awq_compile.targets.vulkan.blob import BlobModule, FunctionInfo, parse_blob
from awq_compile.verify.executors.base import DeviceCode

_CODES: Final = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 6: "bool"}


@dataclass(frozen=True)
class DeviceModule:
    """A device module of a library. `format` names the code: `cl`, `metal`, `vulkan`, `cuda`, `ptx`, `fatbin`, …"""

    kind: str
    format: str
    functions: Mapping[str, FunctionInfo]
    code: bytes = b""
    kernels: Mapping[str, bytes] = field(default_factory=dict)

    def device_code(self) -> DeviceCode:
        """In the form that executors load."""
        types = {name: info.arguments for name, info in self.functions.items()}
        overlapping = frozenset(name for name, info in self.functions.items() if TAG in info.launch_tags)
        return DeviceCode(self.format, self.code, dict(self.kernels), types, overlapping)


def library_code(path: Path) -> list[DeviceModule]:
    """The device modules of a library or archive. Raises `ArtifactError` when it has none or is damaged."""
    return device_modules(module_blob(path), path.name)


def device_modules(blob: bytes, what: str) -> list[DeviceModule]:
    """The device modules in TVM's module blob; `what` names it in messages."""
    try:
        modules = parse_blob(blob).modules
        return [_module(m) for m in modules if m.payload is not None and m.kind != "relax.VMExecutable"]
    except (ArtifactError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{what}: {error}") from None


def _module(module: BlobModule) -> DeviceModule:
    assert module.payload is not None
    reader = _Reader(module.payload, f"the {module.kind} module")
    form = reader.text()
    functions = {}
    for _ in range(reader.count()):
        key = reader.text()
        functions[key] = reader.function()
    if module.kind in ("opencl", "cuda"):
        code = reader.raw()
        reader.end()
        return DeviceModule(module.kind, form, functions, code)
    if module.kind not in ("metal", "vulkan"):
        raise ArtifactError(f"holds a module of the unknown kind {module.kind!r}")
    kernels = {}
    for _ in range(reader.count()):
        key = reader.text()
        kernels[key] = reader.raw()
    reader.end()
    if set(kernels) != set(functions):
        odd = sorted(set(kernels) ^ set(functions))
        raise ArtifactError(f"the {module.kind} module has code or a description, but not both, of {odd[0]}")
    return DeviceModule(module.kind, form, functions, kernels=kernels)


class _Reader:
    """Little-endian numbers, strings and lists, each checked against what is left."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.what, self.at = data, what, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ArtifactError(f"{self.what} has {len(self.data)} bytes; at {self.at} it announces {size} more")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self) -> int:
        """Items of a list: each takes at least one byte."""
        count = self.number(8)
        if count > len(self.data) - self.at:
            raise ArtifactError(f"{self.what} announces {count} items at byte {self.at}")
        return count

    def raw(self) -> bytes:
        return self.take(self.number(8))

    def text(self) -> str:
        return self.raw().decode("utf-8")

    def function(self) -> FunctionInfo:
        name = self.text()
        types = tuple(self.dtype() for _ in range(self.count()))
        tags = tuple(self.text() for _ in range(self.count()))
        return FunctionInfo(name, types, tags, tuple(self.number(4) for _ in range(self.count())))

    def dtype(self) -> str:
        code, bits, lanes = self.number(1), self.number(1), self.number(2)
        if code not in _CODES or lanes != 1:
            raise ArtifactError(f"{self.what} has an argument of the unknown type ({code}, {bits}, {lanes})")
        name = _CODES[code]
        return name if name in ("handle", "bool") else f"{name}{bits}"

    def end(self) -> None:
        if self.at != len(self.data):
            raise ArtifactError(f"{self.what} has {len(self.data) - self.at} bytes too many")
