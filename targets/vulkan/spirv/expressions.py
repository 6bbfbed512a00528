"""Expressions of TensorIR to values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.arithmetic import Arithmetic, Value
from awq_compile.targets.vulkan.spirv.builder import Builder
from awq_compile.targets.vulkan.spirv.enums import Capability, Op, Scope, Semantics
from awq_compile.targets.vulkan.spirv.indexing import IndexEmitter
from awq_compile.targets.vulkan.spirv.intrinsics import glsl_by_number, math_function
from awq_compile.targets.vulkan.spirv.memory import Memory, View
from awq_compile.targets.vulkan.spirv.types import BOOL, INT32, UINT32, DType, parse_dtype

Expr = Any

_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "BitwiseAnd": "and",
    "BitwiseOr": "or",
    "BitwiseXor": "xor",
    "LShift": "shl",
    "RShift": "shr",
    "LT": "lt",
    "LE": "le",
    "GT": "gt",
    "GE": "ge",
    "EQ": "eq",
    "NE": "ne",
}
_CALLED_BINARY = {
    "tirx.bitwise_and": "and",
    "tirx.bitwise_or": "or",
    "tirx.bitwise_xor": "xor",
    "tirx.shift_left": "shl",
    "tirx.shift_right": "shr",
}
_TRANSPARENT = ("tirx.tvm_thread_invariant", "tirx.likely", "prim.likely")


def dtype_of(e: Expr) -> DType:
    """The type of an expression."""
    return parse_dtype(e.ty.dtype)


class ExpressionVisitor:
    """`visit` gives the value of an expression, emitting what computes it.

    `variables` holds the values of variables, `views` the memory behind buffers and pointers, both by the
    variable's hash, which is its address.
    """

    def __init__(self, builder: Builder, read_only: frozenset[int], no_alias: bool) -> None:
        self.builder = builder
        self.types = builder.types
        self.arithmetic = Arithmetic(builder)
        self.index = IndexEmitter(self.arithmetic, self.visit)
        self.memory = Memory(self.arithmetic, self.index, read_only, no_alias)
        self.variables: dict[int, Value] = {}
        self.views: dict[int, View] = {}
        a = self.arithmetic
        self._binary: dict[str, Callable[[Value, Value], Value]] = {
            "Mod": a.mod,
            "FloorDiv": a.floor_div,
            "FloorMod": a.floor_mod,
            "Min": a.minimum,
            "Max": a.maximum,
        }
        self._handlers: dict[str, Callable[[Expr], Value]] = {
            name.removeprefix("_visit_"): getattr(self, name) for name in dir(self) if name.startswith("_visit_")
        }

    def visit(self, e: Expr) -> Value:
        """The value of `e`."""
        name = type(e).__name__
        simple = _BINARY.get(name)
        if simple is not None:
            return self.arithmetic.binary(simple, self.visit(e.a), self.visit(e.b))
        special = self._binary.get(name)
        if special is not None:
            return special(self.visit(e.a), self.visit(e.b))
        handler = self._handlers.get(name)
        if handler is None:
            raise CompileError(f"Vulkan: cannot compile the expression {name}: {e}")
        return handler(e)

    def scalar(self, e: Expr) -> int:
        """The id of a scalar expression."""
        (found,) = self.visit(e).ids
        return found

    # --- leaves

    def _visit_Var(self, e: Expr) -> Value:
        found = self.variables.get(hash(e))
        if found is None:
            raise CompileError(f"Vulkan: {e.name} is used where it has no value")
        return found

    def _visit_IntImm(self, e: Expr) -> Value:
        return self.arithmetic.constant(dtype_of(e), int(e.value))

    def _visit_FloatImm(self, e: Expr) -> Value:
        return self.arithmetic.constant(dtype_of(e), float(e.value))

    def _visit_TensorLoad(self, e: Expr) -> Value:
        (index,) = e.indices
        return self.memory.load(self.view_of(e.source), index, dtype_of(e))

    def view_of(self, buffer: Expr) -> View:
        """The memory of a buffer, of a pointer, or of `buffer_data(buffer)`."""
        if type(buffer).__name__ == "Call" and buffer.op.name == "tirx.buffer_data":
            buffer = buffer.args[0]
        found = self.views.get(hash(buffer))
        if found is None:
            raise CompileError(f"Vulkan: {buffer} is not a buffer that the kernel may access")
        return found

    # --- scalars and vectors

    def _visit_Cast(self, e: Expr) -> Value:
        return self.arithmetic.cast(dtype_of(e), self.visit(e.value))

    def _visit_Not(self, e: Expr) -> Value:
        return self.arithmetic.bitwise_not(self.visit(e.a))

    def _visit_BitwiseNot(self, e: Expr) -> Value:
        return self.arithmetic.bitwise_not(self.visit(e.a))

    def _visit_And(self, e: Expr) -> Value:
        return self._logical(e, "and", stops_at=False)

    def _visit_Or(self, e: Expr) -> Value:
        return self._logical(e, "or", stops_at=True)

    def _logical(self, e: Expr, name: str, *, stops_at: bool) -> Value:
        """The right side is not computed after a left one that decides, where computing it reads memory."""
        left = self.visit(e.a)
        if left.dtype.lanes > 1 or not _reads_memory(e.b):
            return self.arithmetic.binary(name, left, self.visit(e.b))
        known = self.arithmetic.constant(BOOL, stops_at)
        condition = left.ids[0]
        if stops_at:
            return self._choose(condition, lambda: known, lambda: self.visit(e.b))
        return self._choose(condition, lambda: self.visit(e.b), lambda: known)

    def _visit_Select(self, e: Expr) -> Value:
        return self.arithmetic.select(self.visit(e.condition), self.visit(e.true_value), self.visit(e.false_value))

    def _visit_Let(self, e: Expr) -> Value:
        self.bind(e.var, e.value)
        return self.visit(e.body)

    def bind(self, var: Expr, value: Expr) -> None:
        """Gives a variable its value, or a pointer its memory."""
        if type(var.ty).__name__ == "PointerType":
            self.views[hash(var)] = self.view_of(value)
            return
        found = self.visit(value)
        self.variables[hash(var)] = found
        if found.dtype.is_integer and found.dtype.lanes == 1:
            self.index.multiples[hash(var)] = self.index.multiple(value)

    def _visit_Ramp(self, e: Expr) -> Value:
        a, dtype = self.arithmetic, dtype_of(e)
        base = a.broadcast(self.visit(e.base), int(e.lanes))
        steps = a.gather(dtype, [a.constant(dtype.element, i).ids[0] for i in range(dtype.lanes)])
        return a.binary("add", base, a.binary("mul", steps, a.broadcast(self.visit(e.stride), dtype.lanes)))

    def _visit_Broadcast(self, e: Expr) -> Value:
        value, lanes = self.visit(e.value), dtype_of(e).lanes
        return self.arithmetic.broadcast(value, lanes // value.dtype.lanes)

    def _visit_Shuffle(self, e: Expr) -> Value:
        scalars = [s for v in e.vectors for s in self.arithmetic.scalars(self.visit(v))]
        dtype = dtype_of(e)
        if all(type(i).__name__ == "IntImm" for i in e.indices):
            return self.arithmetic.gather(dtype, [scalars[int(i.value)] for i in e.indices])
        found = []
        for i in e.indices:  # chosen at run time
            index, value = self.visit(i), Value(dtype.element, (scalars[0],))
            for k, scalar in enumerate(scalars[1:], 1):
                here = self.arithmetic.binary("eq", index, self.arithmetic.constant(index.dtype, k))
                value = self.arithmetic.select(here, Value(dtype.element, (scalar,)), value)
            found.append(value.ids[0])
        return self.arithmetic.gather(dtype, found)

    # --- calls

    def _visit_Call(self, e: Expr) -> Value:
        name = str(e.op.name)
        binary = _CALLED_BINARY.get(name)
        if binary is not None:
            return self.arithmetic.binary(binary, self.visit(e.args[0]), self.visit(e.args[1]))
        if name in _TRANSPARENT:
            return self.visit(e.args[0])
        special = _CALLS.get(name)
        if special is not None:
            return special(self, e)
        arguments = list(e.args)
        if name in ("tirx.call_pure_extern", "tirx.call_extern"):
            name = str(arguments.pop(0).value)
        function = math_function(name)
        if function is None:
            raise CompileError(f"Vulkan: there is no {name} in a shader")
        found = function(self.arithmetic, tuple(self.visit(x) for x in arguments))
        return self.arithmetic.cast(dtype_of(e), found)

    def _if_then_else(self, e: Expr) -> Value:
        condition, then, otherwise = e.args
        chosen = self.visit(condition)
        if chosen.dtype.lanes > 1 or not (_is_costly(then) or _is_costly(otherwise)):
            return self.arithmetic.select(chosen, self.visit(then), self.visit(otherwise))
        return self._choose(chosen.ids[0], lambda: self.visit(then), lambda: self.visit(otherwise))

    def _choose(self, condition: int, then: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        """The value of one branch; the other is not computed."""
        b = self.builder
        first, second, merge = (b.asm.new_id() for _ in range(3))
        b.merge_selection(merge)
        b.branch_if(condition, first, second)
        found = []
        for label, branch in ((first, then), (second, otherwise)):
            b.begin(label)
            with b.scope():
                found.append((branch(), b.block))
            b.branch(merge)
        b.begin(merge)
        (one, block_one), (two, block_two) = found
        kinds = [self.types.vector(one.dtype, width) for width in one.dtype.widths]
        parts = zip(kinds, one.ids, two.ids, strict=True)
        return Value(one.dtype, tuple(b.phi(kind, (x, block_one), (y, block_two)) for kind, x, y in parts))

    def _reinterpret(self, e: Expr) -> Value:
        return self.arithmetic.bitcast(dtype_of(e), self.visit(e.args[0]))

    def _large_uint(self, e: Expr) -> Value:
        low, high = (int(x.value) for x in e.args)
        return self.arithmetic.constant(dtype_of(e), high << 32 | low)

    def _glsl(self, e: Expr) -> Value:
        operands = tuple(self.visit(x) for x in list(e.args)[1:])
        return self.arithmetic.cast(dtype_of(e), glsl_by_number(self.arithmetic, int(e.args[0].value), operands))

    def _vector_half(self, e: Expr) -> Value:
        scalars, dtype = self.arithmetic.scalars(self.visit(e.args[0])), dtype_of(e)
        part = scalars[: dtype.lanes] if e.op.name == "tirx.vectorlow" else scalars[-dtype.lanes :]
        return self.arithmetic.gather(dtype, part)

    def _vector_combine(self, e: Expr) -> Value:
        return self.arithmetic.gather(dtype_of(e), [s for x in e.args for s in self.arithmetic.scalars(self.visit(x))])

    # --- synchronisation and subgroups

    def _barrier(self, e: Expr) -> Value:
        kind = str(e.args[0].value)
        semantics = Semantics.ACQUIRE_RELEASE | Semantics.WORKGROUP_MEMORY
        if kind == "warp":
            scope, semantics = Scope.SUBGROUP, semantics | Semantics.SUBGROUP_MEMORY
            self.builder.asm.require(Capability.GROUP_NON_UNIFORM)
        elif kind in ("shared", "shared.dyn"):
            scope, semantics = Scope.WORKGROUP, semantics | Semantics.UNIFORM_MEMORY
        else:
            raise CompileError(f"Vulkan: no barrier spans the {kind} scope")
        self.memory.has_barrier = True
        constant = self.types.integer
        self.builder.effect(
            Op.CONTROL_BARRIER, constant(UINT32, scope), constant(UINT32, scope), constant(UINT32, semantics)
        )
        return self.arithmetic.constant(INT32, 0)

    def _active_mask(self, e: Expr) -> Value:
        return self.arithmetic.constant(dtype_of(e), 0xFFFFFFFF)

    def _warp_shuffle(self, e: Expr) -> Value:
        """(mask, value, lane or distance, width, …); beyond its group of `width` a thread gets its own value."""
        a, b = self.arithmetic, self.builder
        value, argument = self.visit(e.args[1]), a.cast(UINT32, self.visit(e.args[2]))
        own = Value(UINT32, (b.component("lane", None),))
        width = a.cast(UINT32, self.visit(e.args[3]))
        within = a.binary("and", own, a.binary("sub", width, a.constant(UINT32, 1)))
        first = a.binary("sub", own, within)
        match str(e.op.name).removeprefix("tirx.tvm_warp_shuffle"):
            case "":
                inside = a.binary("and", argument, a.binary("sub", width, a.constant(UINT32, 1)))
                source = a.binary("add", first, inside)
            case "_xor":
                wanted = a.binary("xor", within, argument)
                source = a.binary("add", first, a.select(a.binary("lt", wanted, width), wanted, within))
            case "_up":
                reached = a.binary("ge", within, argument)
                source = a.select(reached, a.binary("sub", own, argument), own)
            case _:
                reached = a.binary("lt", a.binary("add", within, argument), width)
                source = a.select(reached, a.binary("add", own, argument), own)
        b.asm.require(Capability.GROUP_NON_UNIFORM_SHUFFLE)
        self.types.use(value.dtype)
        kind, scope = self.types.vector, self.types.integer(UINT32, Scope.SUBGROUP)
        parts = zip(value.ids, value.dtype.widths, strict=True)
        return Value(
            value.dtype,
            tuple(
                b.value(Op.GROUP_NON_UNIFORM_SHUFFLE, kind(value.dtype, width), scope, part, *source.ids)
                for part, width in parts
            ),
        )

    def _atomic_add(self, e: Expr) -> Value:
        """(address of an element, value) → the value before."""
        place, value = e.args[0], self.visit(e.args[1])
        load = place.args[0] if str(place.op.name) == "tirx.address_of" else None
        if load is None or not value.dtype.is_integer or value.dtype.bits != 32:
            raise CompileError(f"Vulkan: atomic addition needs an element of an int32 or uint32 buffer, not {place}")
        pointer = self.memory.pointer(self.view_of(load.source), load.indices[0])
        device, relaxed = self.types.integer(UINT32, Scope.DEVICE), self.types.integer(UINT32, 0)
        kind = self.types.vector(value.dtype, 1)
        return Value(value.dtype, (self.builder.value(Op.ATOMIC_I_ADD, kind, pointer, device, relaxed, *value.ids),))


_CALLS: dict[str, Callable[[ExpressionVisitor, Expr], Value]] = {
    "prim.if_then_else": ExpressionVisitor._if_then_else,
    "tirx.if_then_else": ExpressionVisitor._if_then_else,
    "tirx.reinterpret": ExpressionVisitor._reinterpret,
    "tirx.large_uint_imm": ExpressionVisitor._large_uint,
    "prim.large_uint_imm": ExpressionVisitor._large_uint,
    "tirx.call_spirv_pure_glsl450": ExpressionVisitor._glsl,
    "tirx.vectorlow": ExpressionVisitor._vector_half,
    "tirx.vectorhigh": ExpressionVisitor._vector_half,
    "tirx.vectorcombine": ExpressionVisitor._vector_combine,
    "tirx.tvm_storage_sync": ExpressionVisitor._barrier,
    "tirx.tvm_warp_activemask": ExpressionVisitor._active_mask,
    "tirx.tvm_warp_shuffle": ExpressionVisitor._warp_shuffle,
    "tirx.tvm_warp_shuffle_xor": ExpressionVisitor._warp_shuffle,
    "tirx.tvm_warp_shuffle_up": ExpressionVisitor._warp_shuffle,
    "tirx.tvm_warp_shuffle_down": ExpressionVisitor._warp_shuffle,
    "tirx.atomic_add": ExpressionVisitor._atomic_add,
}


def _reads_memory(e: Expr) -> bool:
    """Whether computing `e` loads from a buffer."""
    return _any(e, lambda name: name == "TensorLoad")


def _is_costly(e: Expr) -> bool:
    """Whether `e` is worth a branch around it: it loads, calls, divides, or may have effects."""
    return _any(e, lambda name: name in ("TensorLoad", "Call", "Div", "Mod", "FloorDiv", "FloorMod", "Let"))


def _any(e: Expr, holds: Callable[[str], bool]) -> bool:
    name = type(e).__name__
    if holds(name):
        return True
    return any(_any(x, holds) for x in _children(e, name))


def _children(e: Expr, name: str) -> list[Expr]:
    if name in ("Var", "IntImm", "FloatImm", "StringImm"):
        return []
    match name:
        case "Cast" | "Broadcast":
            return [e.value]
        case "Not" | "BitwiseNot":
            return [e.a]
        case "Select":
            return [e.condition, e.true_value, e.false_value]
        case "Ramp":
            return [e.base, e.stride]
        case "Let":
            return [e.value, e.body]
        case "Shuffle":
            return [*e.vectors, *e.indices]
        case "Call":
            return list(e.args)
        case "TensorLoad":
            return list(e.indices)
    return [e.a, e.b]
