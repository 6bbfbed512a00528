"""The payload of a `relax.VMExecutable`: functions, constants and instructions of TVM's virtual machine.

The layout is that of TVM 0.27 (src/runtime/vm/executable.cc), little-endian:

    u64 magic, str version
    list of functions: i32 kind, str name, i64 first and last instruction, i64 arguments, i64 registers, list of str
    second magic only: u64 count, then (i64, str) memory scopes
    u64 count, then constants: i32 type, value
    list of i64 offsets of instructions, list of i64 words

Nothing is trusted: what does not fit stops with `ArtifactError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from awq_compile.errors import ArtifactError

KIND: Final = "relax.VMExecutable"
OF_VM: Final = 1  # the kind of a function that is VM code; others are looked up elsewhere
_MAGIC: Final = (0xD225DE2F4214151D, 0xD225DE2F4214151E)
_TENSOR_MAGIC: Final = 0xDD5E40F096B4A13F
_INT, _FLOAT, _DTYPE, _STR, _SHAPE, _TENSOR = 1, 3, 5, 65, 69, 70  # of TVM-FFI's TVMFFITypeIndex
_CALL, _RET = 1, 2  # opcodes
_REGISTER, _IMMEDIATE, _CONSTANT, _FUNCTION = range(4)  # kinds of an argument, in the upper byte of its word
_CODES: Final = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 6: "bool"}  # DLPack's


@dataclass(frozen=True)
class DType:
    """A data type among the constants."""

    name: str


@dataclass(frozen=True)
class Register:
    """An argument that is the value of a register."""

    index: int


@dataclass(frozen=True)
class FunctionName:
    """An argument that is a function."""

    name: str


T = TypeVar("T")

# Shapes are tuples; a tensor's values are not kept, only that it is one.
Constant = int | float | str | DType | tuple[int, ...] | None
Argument = Register | FunctionName | Constant


@dataclass(frozen=True)
class Call:
    """`registers[to] = function(*arguments)`"""

    function: str
    arguments: tuple[Argument, ...]
    to: int


@dataclass(frozen=True)
class Return:
    """The value of a register."""

    register: int


@dataclass(frozen=True)
class VMFunction:
    """Instructions [start, stop) of the executable; arguments arrive in the first registers."""

    name: str
    kind: int
    start: int
    stop: int
    num_arguments: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Executable:
    """`offsets[i]` is where instruction i begins in `words`."""

    functions: tuple[VMFunction, ...]
    constants: tuple[Constant, ...]
    offsets: tuple[int, ...]
    words: tuple[int, ...]

    def function(self, name: str) -> VMFunction | None:
        """The VM code of that name."""
        return next((f for f in self.functions if f.name == name and f.kind == OF_VM), None)

    def instructions(self, function: VMFunction) -> Iterator[Call | Return | None]:
        """In order; None stands for a jump. Raises `ArtifactError` for what points outside."""
        for index in range(function.start, function.stop):
            at = _at(self.offsets, index, "an instruction")
            opcode = _at(self.words, at, "an instruction")
            if opcode == _RET:
                yield Return(_at(self.words, at + 1, "a register"))
            elif opcode == _CALL:
                to, callee, count = (_at(self.words, at + i, "a call") for i in (1, 2, 3))
                if not 0 <= count <= len(self.words) - at - 4:
                    raise ArtifactError(f"the VM code announces a call with {count} arguments at word {at}")
                arguments = tuple(map(self._argument, self.words[at + 4 : at + 4 + count]))
                yield Call(_at(self.functions, callee, "a function").name, arguments, to)
            else:
                yield None

    def _argument(self, word: int) -> Argument:
        kind, value = (word >> 56) & 0xFF, word & (1 << 56) - 1
        value -= (value >> 55) << 56  # the sign
        if kind == _REGISTER:
            return Register(value)
        if kind == _IMMEDIATE:
            return value
        if kind == _CONSTANT:
            return _at(self.constants, value, "a constant")
        if kind == _FUNCTION:
            return FunctionName(_at(self.functions, value, "a function").name)
        raise ArtifactError(f"the VM code has an argument of the unknown kind {kind}")


def _at(items: tuple[T, ...], index: int, what: str) -> T:
    if not 0 <= index < len(items):
        raise ArtifactError(f"the VM code names {what} {index} of {len(items)}")
    return items[index]


def parse_executable(data: bytes) -> Executable:
    """Reads a payload. Raises `ArtifactError` where it is damaged or of another version."""
    try:
        return _Reader(data).executable()
    except (struct.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"the VM code cannot be read: {error}") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ArtifactError(f"the VM code has {len(self.data)} bytes; at {self.at} it announces {size} more")
        self.at += size
        return self.data[self.at - size : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def count(self) -> int:
        """Items of a list: each takes at least one byte."""
        count = self.unsigned(8)
        if count > len(self.data) - self.at:
            raise ArtifactError(f"the VM code announces {count} items at byte {self.at}")
        return count

    def text(self) -> str:
        return self.take(self.unsigned(8)).decode()

    def numbers(self) -> tuple[int, ...]:
        count = self.count()
        return struct.unpack(f"<{count}q", self.take(8 * count))

    def dtype(self) -> DType:
        code, bits, lanes = struct.unpack("<BBH", self.take(4))
        name = _CODES.get(code, f"type{code}_")
        name = name if name in ("handle", "bool") else f"{name}{bits}"
        return DType(name if lanes == 1 else f"{name}x{lanes}")

    def executable(self) -> Executable:
        magic = self.unsigned(8)
        if magic not in _MAGIC:
            raise ArtifactError(f"the VM code begins with {magic:#x}, expected {_MAGIC[-1]:#x}")
        self.text()  # the version
        functions = tuple(self.function() for _ in range(self.count()))
        if magic == _MAGIC[1]:
            for _ in range(self.count()):  # memory scopes
                self.signed(8)
                self.text()
        constants = tuple(self.constant() for _ in range(self.count()))
        offsets, words = self.numbers(), self.numbers()
        if self.at != len(self.data):
            raise ArtifactError(f"the VM code has {len(self.data) - self.at} bytes too many")
        return Executable(functions, constants, offsets, words)

    def function(self) -> VMFunction:
        kind, name = self.signed(4), self.text()
        start, stop, arguments, _registers = (self.signed(8) for _ in range(4))
        parameters = tuple(self.text() for _ in range(self.count()))
        if kind == OF_VM and not 0 <= arguments <= len(parameters):
            raise ArtifactError(f"the VM code names {len(parameters)} of {arguments} arguments of {name:.80}")
        return VMFunction(name, kind, start, stop, arguments, parameters)

    def constant(self) -> Constant:
        kind = self.signed(4)
        if kind == _INT:
            return self.signed(8)
        if kind == _FLOAT:
            return float(struct.unpack("<d", self.take(8))[0])
        if kind == _DTYPE:
            return self.dtype()
        if kind == _STR:
            return self.text()
        if kind == _SHAPE:
            return self.numbers()
        if kind == _TENSOR:
            self.skip_tensor()
            return None
        raise ArtifactError(f"the VM code has a constant of the unknown type {kind}")

    def skip_tensor(self) -> None:
        if (magic := self.unsigned(8)) != _TENSOR_MAGIC:
            raise ArtifactError(f"a tensor of the VM code begins with {magic:#x}, expected {_TENSOR_MAGIC:#x}")
        self.take(16)  # reserved, device type and id
        ndim = self.unsigned(4)
        self.dtype()
        self.take(8 * ndim)
        self.take(self.unsigned(8))
