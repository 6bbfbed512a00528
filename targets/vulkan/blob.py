"""The device code in an exported library: TVM's module blob, read and rewritten.

    u64 bytes of the rest
    u64 list row_ptr, u64 list child_indices: the import tree, row i has the imports of module i
    per module: str kind, then its payload as str; "_lib" (the host code) has none
    OpenCL and CUDA payload: str fmt, map<str, FunctionInfo>, bytes code
    Vulkan payload: str fmt, map<str, FunctionInfo>, map<str, bytes shader>
    shader: u32 flag, u64 number of words, words
    FunctionInfo: str name, list of (u8 code, u8 bits, u16 lanes), list of str launch tags, list of i32 extra tags

All little-endian; str, bytes, list and map start with a u64 count.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from awq_compile.errors import ArtifactError
from awq_compile.targets.vulkan.spirv.shader import HANDLE, Shader

_HOST: Final = "_lib"
# A size below 2^40, fewer than 256 rows (not 0 or 1), of which the first is 0. The size is looked at only ahead, so
# that overlapping candidates are seen.
_BEGINNING: Final = re.compile(rb"(?s)(?=.{5}\0{3}[^\0\x01]\0{7}\0{8})")
_CODES: Final = ("int", "uint", "float")
_HANDLE_CODE: Final = 3
_BOOL_CODE: Final = 6

T = TypeVar("T")


@dataclass(frozen=True)
class FunctionInfo:
    """How a kernel is launched: types of its arguments ("handle" for a buffer), launch tags in order."""

    name: str
    arguments: tuple[str, ...]
    launch_tags: tuple[str, ...]
    extra_tags: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlobModule:
    """A module of the import tree. `payload` is None for the host code."""

    kind: str
    payload: bytes | None


@dataclass(frozen=True)
class Blob:
    """Modules in the order of the tree's rows."""

    row_ptr: tuple[int, ...]
    child_indices: tuple[int, ...]
    modules: tuple[BlobModule, ...]


class _Reader:
    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.what, self.at = data, what, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ArtifactError(f"{self.what} ends at byte {len(self.data)}, {size} more are announced at {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def raw(self) -> bytes:
        return self.take(self.u64())

    def text(self) -> str:
        return self.raw().decode()

    def many(self, item: Callable[[], T]) -> tuple[T, ...]:
        count = self.u64()
        if count > len(self.data) - self.at:
            raise ArtifactError(f"{self.what} announces {count} items at byte {self.at}")
        return tuple(item() for _ in range(count))

    def end(self) -> None:
        if self.at != len(self.data):
            raise ArtifactError(f"{self.what} has {len(self.data) - self.at} bytes too many")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _raw(data: bytes) -> bytes:
    return _u64(len(data)) + data


def _text(value: str) -> bytes:
    return _raw(value.encode())


def parse_blob(data: bytes) -> Blob:
    """The modules in a blob. Raises `ArtifactError` if it is damaged or of another format."""
    reader = _Reader(data, "the library's module blob")
    size = reader.u64()
    if size != len(data) - 8:
        raise ArtifactError(f"the library's module blob announces {size} bytes and has {len(data) - 8}")
    row_ptr, children = reader.many(reader.u64), reader.many(reader.u64)
    if not row_ptr or row_ptr[0] != 0 or row_ptr[-1] != len(children) or list(row_ptr) != sorted(row_ptr):
        raise ArtifactError(f"the library's module blob has the import tree {row_ptr}, {children}")
    modules = []
    for _ in range(len(row_ptr) - 1):
        kind = reader.text()
        modules.append(BlobModule(kind, None if kind == _HOST else reader.raw()))
    reader.end()
    return Blob(row_ptr, children, tuple(modules))


def write_blob(blob: Blob) -> bytes:
    """Inverse of `parse_blob`."""
    parts = []
    for numbers in (blob.row_ptr, blob.child_indices):
        parts += [_u64(len(numbers)), *map(_u64, numbers)]
    for module in blob.modules:
        parts.append(_text(module.kind))
        if module.payload is not None:
            parts.append(_raw(module.payload))
    return _raw(b"".join(parts))


def find_blob(data: bytes) -> Blob:
    """The module blob within an object file or shared library, whatever its format.

    It has no magic number: what begins like a blob, announces a size that fits and parses to the end, is one.
    """
    for match in _BEGINNING.finditer(data):
        start = match.start()
        size = int.from_bytes(data[start : start + 8], "little")
        if size <= len(data) - start - 8:
            try:
                return parse_blob(data[start : start + 8 + size])
            except (ArtifactError, UnicodeDecodeError):
                continue
    raise ArtifactError("the library carries no device code")


def parse_opencl_payload(payload: bytes) -> tuple[dict[str, FunctionInfo], bytes]:
    """(functions, source); CUDA's has the same form, with any code."""
    reader = _Reader(payload, "the device module")
    reader.text()
    functions = _read_functions(reader)
    code = reader.raw()
    reader.end()
    return functions, code


def write_code_payload(form: str, functions: Mapping[str, FunctionInfo], code: bytes) -> bytes:
    """Inverse of `parse_opencl_payload`, sorted by name."""
    parts = [_text(form), _u64(len(functions))]
    for name, info in sorted(functions.items()):
        parts += [_text(name), _function(info)]
    return b"".join([*parts, _raw(code)])


def parse_vulkan_payload(payload: bytes) -> tuple[dict[str, FunctionInfo], dict[str, Shader]]:
    """(functions, shaders)"""
    reader = _Reader(payload, "the Vulkan module")
    fmt = reader.text()
    if fmt != "vulkan":
        raise ArtifactError(f"the Vulkan module has the format {fmt!r}")
    functions = _read_functions(reader)
    shaders = {}
    for _ in range(reader.u64()):
        name = reader.text()
        inner = _Reader(reader.raw(), f"the shader {name}")
        flag, count = inner.u32(), inner.u64()
        words = struct.unpack(f"<{count}I", inner.take(4 * count))
        inner.end()
        if name not in functions:
            raise ArtifactError(f"the shader {name} has no function")
        shaders[name] = Shader(name, functions[name].arguments, flag, words)
    reader.end()
    return functions, shaders


def write_vulkan_payload(functions: Mapping[str, FunctionInfo], shaders: Mapping[str, Shader]) -> bytes:
    """Inverse of `parse_vulkan_payload`, sorted by name."""
    parts = [_text("vulkan"), _u64(len(functions))]
    for name, info in sorted(functions.items()):
        parts += [_text(name), _function(info)]
    parts.append(_u64(len(shaders)))
    for name, shader in sorted(shaders.items()):
        count = len(shader.words)
        parts += [_text(name), _raw(struct.pack(f"<IQ{count}I", shader.flag, count, *shader.words))]
    return b"".join(parts)


def _read_functions(reader: _Reader) -> dict[str, FunctionInfo]:
    found = {}
    for _ in range(reader.u64()):
        key = reader.text()
        name, types = reader.text(), reader.many(lambda: _type_name(*struct.unpack("<BBH", reader.take(4))))
        found[key] = FunctionInfo(name, types, reader.many(reader.text), reader.many(reader.u32))
    return found


def _function(info: FunctionInfo) -> bytes:
    parts = [_text(info.name), _u64(len(info.arguments)), *map(_type_code, info.arguments)]
    parts += [_u64(len(info.launch_tags)), *map(_text, info.launch_tags)]
    parts += [_u64(len(info.extra_tags)), *[tag.to_bytes(4, "little") for tag in info.extra_tags]]
    return b"".join(parts)


def _type_name(code: int, bits: int, lanes: int) -> str:
    if code == _HANDLE_CODE:
        return HANDLE
    if code == _BOOL_CODE:
        return "bool"
    if code >= len(_CODES) or lanes != 1:
        raise ArtifactError(f"a kernel's argument has the unknown type ({code}, {bits}, {lanes})")
    return f"{_CODES[code]}{bits}"


def _type_code(name: str) -> bytes:
    if name == HANDLE:
        return struct.pack("<BBH", _HANDLE_CODE, 64, 1)
    if name == "bool":
        return struct.pack("<BBH", _BOOL_CODE, 8, 1)
    kind = name.rstrip("0123456789")
    return struct.pack("<BBH", _CODES.index(kind), int(name.removeprefix(kind)), 1)
