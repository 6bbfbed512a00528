"""Signatures of a library's functions, read from its code: what each takes and returns.

TVM checks every argument of a Relax function on entry (`vm.builtin.check_tensor_info`, `match_shape`) and writes
each result into a tensor that the function allocates: following the registers gives all types, symbolic sizes
included. A host PrimFunc carries its signature as the text of its own error message:

    gather_probs(src: Tensor([m, 4096], float32), indices: Tensor([b], int32), dst: Tensor([b, 4096], float32))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from awq_compile.contract.executable import (
    Argument,
    Call,
    DType,
    Executable,
    FunctionName,
    Register,
    Return,
    VMFunction,
)

Size = int | str | None  # a number, a symbolic size, or not known


@dataclass(frozen=True)
class TensorType:
    """`shape` in elements."""

    shape: tuple[Size, ...]
    dtype: str

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"({sizes}{',' if len(self.shape) == 1 else ''}) {self.dtype}"


@dataclass(frozen=True)
class ShapeType:
    """A `Shape` of so many numbers."""

    length: int

    def __str__(self) -> str:
        return f"Shape[{self.length}]"


@dataclass(frozen=True)
class ParamsType:
    """The model's parameters: a tuple of so many tensors, with their types where the code tells them."""

    count: int
    tensors: tuple[TensorType, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} parameters"


@dataclass(frozen=True)
class TupleType:
    """A tuple that the function makes."""

    items: tuple[Type, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


@dataclass(frozen=True)
class NamedType:
    """Anything that is known by a word: "object", a text, a KV cache, a number of some dtype."""

    name: str

    def __str__(self) -> str:
        return self.name


Type = TensorType | ShapeType | ParamsType | TupleType | NamedType
OBJECT: Final = NamedType("object")
TEXT: Final = NamedType("text")
NOTHING: Final = NamedType("nothing")
ANYTHING: Final = NamedType("anything")


@dataclass(frozen=True)
class Signature:
    """Of one function. A PrimFunc returns nothing: it writes into an argument."""

    arguments: tuple[Type, ...]
    result: Type

    def __str__(self) -> str:
        result = "" if self.result == NOTHING else f" -> {self.result}"
        return f"({', '.join(map(str, self.arguments))}){result}"

    def meets(self, expected: Signature) -> bool:
        """Whether a caller that expects the other one can call this: equal but for the names of symbolic sizes.

        What works in place (NOTHING is expected) may return what it likes.
        """
        found = self
        if expected.result in (ANYTHING, NOTHING):
            found = Signature(self.arguments, expected.result)
        return found.canonical() == expected.canonical()

    def canonical(self) -> Signature:
        """With symbolic sizes named n0, n1, … as they first appear, so that equal signatures are equal."""
        names: dict[str, str] = {}

        def size(value: Size) -> Size:
            return names.setdefault(value, f"n{len(names)}") if isinstance(value, str) else value

        def renamed(kind: Type) -> Type:
            if isinstance(kind, TensorType):
                return TensorType(tuple(map(size, kind.shape)), kind.dtype)
            if isinstance(kind, ParamsType):
                return ParamsType(kind.count)
            if isinstance(kind, TupleType):
                return TupleType(tuple(map(renamed, kind.items)))
            return kind

        return Signature(tuple(map(renamed, self.arguments)), renamed(self.result))


def relax_signature(executable: Executable, function: VMFunction) -> Signature:
    """Of a function of the virtual machine. Raises `ArtifactError` for code that points outside."""
    return _Follower(executable, function).run()


def returned_text(executable: Executable, function: VMFunction) -> str | None:
    """The text that a function returns, like `_metadata`; None where it returns something else."""
    values: dict[int, Argument] = {}
    for step in executable.instructions(function):
        if isinstance(step, Call) and step.function == "vm.builtin.copy" and len(step.arguments) == 1:
            values[step.to] = step.arguments[0]
        elif isinstance(step, Return):
            value = values.get(step.register)
            return value if isinstance(value, str) else None
    return None


def calls_of(executable: Executable, function: VMFunction, callee: str) -> Iterator[Call]:
    """The calls of `callee` within a function."""
    for step in executable.instructions(function):
        if isinstance(step, Call) and step.function == callee:
            yield step


def prim_signature(name: str, data: bytes) -> Signature | None:
    """Of the host PrimFunc with the symbol `__tvm_ffi_<name>`, from the bytes of its library; None where absent."""
    found = re.search(rb"(?:^|\0)" + re.escape(name.encode()) + rb"\(([ -~]{0,4000})\)\0", data)
    if found is None:
        return None
    arguments: list[Type] = []
    for match in _PARAMETER.finditer(found[1].decode()):
        shape, dtype, other = match["shape"], match["dtype"], match["other"]
        if dtype is None:
            arguments.append(NamedType(other))
        else:
            sizes = [size.strip() for size in shape.split(",") if size.strip()]
            arguments.append(TensorType(tuple(int(s) if s.isdigit() else s for s in sizes), dtype))
    return Signature(tuple(arguments), NOTHING)


_PARAMETER: Final = re.compile(r"[\w.]+: (?:Tensor\(\[(?P<shape>[^\]]*)\], (?P<dtype>\w+)\)|(?P<other>\w+))(?:, |$)")
_ANNOTATED: Final = re.compile(r'R\.Tensor\(\((?P<shape>[^")]*(?:\(\d+\)[^")]*)*)\), dtype="(?P<dtype>\w+)"\)')


class _Follower:
    """Walks a function's code once, with the type of every register."""

    def __init__(self, executable: Executable, function: VMFunction) -> None:
        self.executable, self.function = executable, function
        self.types: dict[int, Type] = {}

    def run(self) -> Signature:
        result: Type = NamedType("unknown")
        for step in self.executable.instructions(self.function):
            if step is None:
                break  # a branch: what follows is not followed
            if isinstance(step, Return):
                result = self.types.get(step.register, OBJECT)
                break
            self.call(step)
        arguments = (self.types.get(i, OBJECT) for i in range(self.function.num_arguments))
        return Signature(tuple(arguments), result)

    def call(self, step: Call) -> None:
        name, args = step.function.removeprefix("vm.builtin."), step.arguments
        first = args[0].index if args and isinstance(args[0], Register) else None
        numbers = [a if isinstance(a, int) else -1 for a in args]
        if name == "check_tensor_info" and first is not None and len(args) > 2:
            dtype = args[2].name if isinstance(args[2], DType) else "any"
            self.types[first] = TensorType((None,) * min(max(numbers[1], 0), 64), dtype)
        elif name == "check_shape_info" and first is not None and len(args) > 1:
            self.types[first] = ShapeType(numbers[1])
        elif name == "check_tuple_info" and first is not None and len(args) > 1:
            self.types[first] = ParamsType(numbers[1], _annotated(args[-1]))
        elif name == "check_prim_value_info" and first is not None and len(args) > 1 and isinstance(args[1], DType):
            self.types[first] = NamedType(args[1].name)
        elif name == "match_shape" and first is not None and len(args) > 2:
            kind = self.types.get(first)
            if isinstance(kind, TensorType):
                # Codes of MatchShapeCode: 0 a number, 1 stores a size, 2 nothing, 3 compares with a stored one.
                sizes = _sizes(numbers[3 : 3 + 2 * len(kind.shape)], {0: False, 1: True, 3: True})
                if len(sizes) == len(kind.shape):
                    self.types[first] = TensorType(sizes, kind.dtype)
        else:
            self.types[step.to] = self.result(name, args, numbers)

    def result(self, name: str, args: Sequence[Argument], numbers: list[int]) -> Type:
        """Type of what a call returns."""
        if name == "make_shape":
            # Codes of MakeShapeCode: 0 a number, 1 a stored size. The sizes are kept as a tensor without dtype.
            return TensorType(_sizes(numbers[2:], {0: False, 1: True}), "")
        if name == "alloc_tensor" and len(args) > 3:
            return TensorType(self.shape(args[2]), args[3].name if isinstance(args[3], DType) else "any")
        if name == "reshape" and len(args) > 1:
            source = self.of(args[0])
            return TensorType(self.shape(args[1]), source.dtype if isinstance(source, TensorType) else "any")
        if name == "make_tuple":
            return TupleType(tuple(map(self.of, args)))
        if name == "copy" and len(args) == 1:
            return TEXT if isinstance(args[0], str) else self.of(args[0])
        if name == "tuple_getitem" and len(args) > 1:
            source, index = self.of(args[0]), numbers[1]
            if isinstance(source, TupleType) and 0 <= index < len(source.items):
                return source.items[index]
            if isinstance(source, ParamsType) and 0 <= index < len(source.tensors):
                return source.tensors[index]
        return OBJECT

    def of(self, argument: Argument) -> Type:
        if isinstance(argument, Register):
            return self.types.get(argument.index, OBJECT)
        return NamedType(argument.name) if isinstance(argument, FunctionName) else OBJECT

    def shape(self, argument: Argument) -> tuple[Size, ...]:
        if isinstance(argument, tuple):
            return argument
        kind = self.of(argument)
        return kind.shape if isinstance(kind, TensorType) and kind.dtype == "" else ()


def _sizes(pairs: list[int], symbolic: dict[int, bool]) -> tuple[Size, ...]:
    """From (code, value) pairs: `symbolic` tells whether a code's value is a place of a stored size."""
    sizes: list[Size] = []
    for code, value in zip(pairs[::2], pairs[1::2], strict=False):
        sizes.append(None if code not in symbolic else f"s{value}" if symbolic[code] else value)
    return tuple(sizes)


def _annotated(context: Argument) -> tuple[TensorType, ...]:
    """Types of the parameters, from the text that TVM would show in an error."""
    if not isinstance(context, str):
        return ()
    found = []
    for match in _ANNOTATED.finditer(context):
        sizes = re.findall(r"\d+", match["shape"].replace("int64", ""))
        found.append(TensorType(tuple(map(int, sizes)), match["dtype"]))
    return tuple(found)
