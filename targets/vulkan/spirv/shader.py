"""One device function to one `Shader`, by the calling convention of TVM's Vulkan runtime.

The entry point has the function's name; pointer parameter i is the storage buffer at set 0, binding i;
scalar parameters are 8-byte slots in push constants, in order, or beyond 128 bytes in a uniform buffer at
the binding behind the last storage buffer, with bit 0 of `flag` set. The local size is that of threadIdx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.arithmetic import Value
from awq_compile.targets.vulkan.spirv.assembler import Assembler, instruction, text
from awq_compile.targets.vulkan.spirv.builder import Builder
from awq_compile.targets.vulkan.spirv.enums import GL_COMPUTE, LOCAL_SIZE, Capability, Decoration, Op, StorageClass
from awq_compile.targets.vulkan.spirv.expressions import ExpressionVisitor
from awq_compile.targets.vulkan.spirv.limits import Limits
from awq_compile.targets.vulkan.spirv.memory import StorageBuffer
from awq_compile.targets.vulkan.spirv.statements import StatementVisitor
from awq_compile.targets.vulkan.spirv.types import UINT32, DType, TypeTable, parse_dtype

USES_UNIFORM_BUFFER: Final = 1  # bit 0 of the flag
SLOT_BYTES: Final = 8
HANDLE: Final = "handle"
_SCALARS: Final = ("int32", "int64", "uint32", "float32", "float64")  # what TVM's runtime can pack
_HEADER_WORDS: Final = 5


@dataclass(frozen=True)
class Shader:
    """A compiled kernel. `arguments` are "handle" for a buffer, else the scalar's type."""

    name: str
    arguments: tuple[str, ...]
    flag: int
    words: tuple[int, ...]

    @property
    def uses_uniform_buffer(self) -> bool:
        """Whether scalars come in a uniform buffer instead of push constants."""
        return bool(self.flag & USES_UNIFORM_BUFFER)

    @property
    def capabilities(self) -> frozenset[int]:
        """Numbers of the declared capabilities."""
        return frozenset(operands[0] for op, operands in self._instructions() if op == Op.CAPABILITY)

    @property
    def local_size(self) -> tuple[int, int, int]:
        """Threads of a block."""
        for op, operands in self._instructions():
            if op == Op.EXECUTION_MODE and operands[1] == LOCAL_SIZE:
                x, y, z = operands[2:]
                return x, y, z
        raise CompileError(f"the shader {self.name} declares no local size")

    @property
    def written_bindings(self) -> tuple[bool, ...]:
        """For each buffer, whether the shader may write it."""
        binding_of: dict[int, int] = {}
        read_only = set()
        for op, operands in self._instructions():
            if op == Op.DECORATE and operands[1] == Decoration.BINDING:
                binding_of[operands[0]] = operands[2]
            elif op == Op.DECORATE and operands[1] == Decoration.NON_WRITABLE:
                read_only.add(operands[0])
        written = {binding for variable, binding in binding_of.items() if variable not in read_only}
        return tuple(i in written for i in range(self.arguments.count(HANDLE)))

    def _instructions(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(opcode, operands)"""
        position = _HEADER_WORDS
        while position < len(self.words):
            length = self.words[position] >> 16
            yield self.words[position] & 0xFFFF, self.words[position + 1 : position + length]
            position += length


def build_shader(function: Any, limits: Limits) -> Shader:
    """Compiles a lowered device PrimFunc. Raises `CompileError` for what a shader cannot do."""
    name = str(function.attrs["global_symbol"])
    try:
        return _build(function, name, limits)
    except CompileError as error:
        if name in str(error):
            raise
        raise CompileError(f"{name}: {error}", hint=error.hint) from None


def _build(function: Any, name: str, limits: Limits) -> Shader:
    asm = Assembler()
    asm.require(Capability.SHADER)
    types = TypeTable(asm)
    builder = Builder(asm, types)
    buffers, scalars, arguments = _parameters(function)
    written = written_variables(function.body)
    read_only = frozenset(b.binding for var, b in buffers if hash(var) not in written)
    no_alias = bool(function.attrs.get("tirx.noalias", False))
    visitor = ExpressionVisitor(builder, read_only, no_alias)
    visitor.memory.packs_halves = {Capability.FLOAT16, Capability.INT16} <= limits.capabilities
    statements = StatementVisitor(visitor)
    main, entry_kind = asm.new_id(), types.function()
    builder.begin(asm.new_id())
    first_block = len(builder.code)  # variables follow the first label

    for var, buffer in buffers:
        statements.declare(var, buffer)
    uniform = SLOT_BYTES * len(scalars) > limits.push_constant_bytes
    if scalars:
        _load_scalars(visitor, scalars, len(buffers) if uniform else None)
    statements.visit(function.body)
    builder.leave()
    visitor.memory.finish([b for _, b in buffers])

    asm.entry += instruction(Op.ENTRY_POINT, GL_COMPUTE, main, *text(name), *builder.inputs.values())
    asm.entry += instruction(Op.EXECUTION_MODE, main, LOCAL_SIZE, *statements.local_size)
    asm.functions += instruction(Op.FUNCTION, types.void(), main, 0, entry_kind)
    asm.functions += [*builder.code[:first_block], *builder.variables, *builder.code[first_block:]]
    asm.functions += instruction(Op.FUNCTION_END)
    limits.check(name, asm.capabilities, statements.local_size, visitor.memory.shared_bytes, len(buffers))
    return Shader(name, arguments, USES_UNIFORM_BUFFER if uniform else 0, tuple(asm.finish()))


def _parameters(function: Any) -> tuple[list[tuple[Any, StorageBuffer]], list[tuple[Any, DType]], tuple[str, ...]]:
    """(buffers, scalars, all arguments' types)"""
    buffers: list[tuple[Any, StorageBuffer]] = []
    scalars: list[tuple[Any, DType]] = []
    arguments = []
    for param in function.params:
        if type(param.ty).__name__ == "PointerType":
            buffers.append((param, StorageBuffer(len(buffers), str(param.name))))
            arguments.append(HANDLE)
            continue
        dtype = str(param.ty.dtype)
        if dtype not in _SCALARS:
            raise CompileError(f"the scalar parameter {param.name} is {dtype}; a launch takes {', '.join(_SCALARS)}")
        scalars.append((param, parse_dtype(dtype)))
        arguments.append(dtype)
    return buffers, scalars, tuple(arguments)


def _load_scalars(visitor: ExpressionVisitor, scalars: list[tuple[Any, DType]], binding: int | None) -> None:
    """Reads all slots at the start; `binding` is that of the uniform buffer."""
    b, types = visitor.builder, visitor.types
    storage = StorageClass.PUSH_CONSTANT if binding is None else StorageClass.UNIFORM
    block = types.global_variable(storage, types.slots([dtype for _, dtype in scalars]))
    b.asm.name(block, "scalars")
    if binding is not None:
        b.asm.decorate(block, Decoration.DESCRIPTOR_SET, 0)
        b.asm.decorate(block, Decoration.BINDING, binding)
    for i, (param, dtype) in enumerate(scalars):
        kind = types.vector(dtype, 1)
        place = b.pure(Op.ACCESS_CHAIN, types.pointer(storage, kind), block, types.integer(UINT32, i))
        visitor.variables[hash(param)] = Value(dtype, (b.pure(Op.LOAD, kind, place),))


def written_variables(body: Any) -> set[int]:
    """Hashes of the buffers and pointers that a statement stores to, under all their names."""
    written: set[int] = set()
    source: dict[int, Any] = {}

    def collect(s: Any) -> None:
        match type(s).__name__:
            case "BufferStore":
                written.add(hash(s.buffer))
            case "DeclBuffer":
                source[hash(s.buffer)] = s.data
            case "Bind" if type(s.var.ty).__name__ == "PointerType":
                source[hash(s.var)] = s.value
            case "Evaluate" if type(s.value).__name__ == "Call":
                _collect_addresses(s.value, written)
            case "SeqStmt":
                for inner in s.seq:
                    collect(inner)
            case "IfThenElse":
                collect(s.then_case)
                if s.else_case is not None:
                    collect(s.else_case)
            case "For" | "While" | "AttrStmt":
                collect(s.body)

    collect(body)
    for start in list(written):
        at = start
        while at in source:
            data = source[at]
            at = hash(data.args[0] if type(data).__name__ == "Call" else data)
            written.add(at)
    return written


def _collect_addresses(call: Any, written: set[int]) -> None:
    """Buffers whose elements an atomic operation gets the address of."""
    for argument in call.args:
        if type(argument).__name__ == "Call":
            if str(argument.op.name) == "tirx.address_of":
                written.add(hash(argument.args[0].source))
            _collect_addresses(argument, written)
