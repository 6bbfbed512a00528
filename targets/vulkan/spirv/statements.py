"""Statements of TensorIR to structured control flow.

Every selection and loop is a construct with one entry and one merge block, as SPIR-V demands: a loop is
head (phi, condition), body, continue block; a `while` has a block of its own for its condition.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.arithmetic import Value
from awq_compile.targets.vulkan.spirv.enums import LoopControl, StorageClass
from awq_compile.targets.vulkan.spirv.expressions import ExpressionVisitor, dtype_of
from awq_compile.targets.vulkan.spirv.memory import StorageBuffer, View
from awq_compile.targets.vulkan.spirv.types import UINT32, parse_dtype

Stmt = Any

_STORAGE = {
    "local": StorageClass.FUNCTION,
    "shared": StorageClass.WORKGROUP,
    "shared.dyn": StorageClass.WORKGROUP,
}
_UNROLLED = 3  # ForKind
_AXES = {"x": 0, "y": 1, "z": 2}
_IGNORED = ("AssertStmt", "ScopeIdDefStmt")
_JUMPS = {
    "tirx.break_loop": "Break",
    "tirx.continue_loop": "Continue",
    "tirx.thread_return": "Return",
    "tirx.ret": "Return",
}


class StatementVisitor:
    """Emits statements through an expression visitor. `local_size` fills up as threads are declared."""

    def __init__(self, expressions: ExpressionVisitor) -> None:
        self.expressions = expressions
        self.builder = expressions.builder
        self.types = expressions.types
        self.local_size = [1, 1, 1]
        self._loops: list[tuple[int, int]] = []  # (merge, continue) of the loops around
        self._handlers: dict[str, Callable[[Stmt], None]] = {
            name.removeprefix("_visit_"): getattr(self, name) for name in dir(self) if name.startswith("_visit_")
        }

    def visit(self, s: Stmt) -> None:
        """Emits `s`; what follows a jump is dropped."""
        if self.builder.terminated:
            return
        name = type(s).__name__
        handler = self._handlers.get(name)
        if handler is not None:
            handler(s)
        elif name not in _IGNORED:
            raise CompileError(f"Vulkan: cannot compile the statement {name}")

    def _visit_SeqStmt(self, s: Stmt) -> None:
        for inner in s.seq:
            self.visit(inner)

    def _visit_Evaluate(self, s: Stmt) -> None:
        value = s.value
        name = type(value).__name__
        if name == "Call":
            jump = _JUMPS.get(str(value.op.name))
            if jump is not None:
                self._handlers[jump](s)
            else:
                self.expressions.visit(value)
        elif name not in ("IntImm", "Var"):
            self.expressions.visit(value)

    def _visit_Bind(self, s: Stmt) -> None:
        self.expressions.bind(s.var, s.value)

    def _visit_BufferStore(self, s: Stmt) -> None:
        (index,) = s.indices
        value = self.expressions.visit(s.value)
        self.expressions.memory.store(self.expressions.view_of(s.buffer), index, value)

    # --- memory

    def _visit_AllocBuffer(self, s: Stmt) -> None:
        buffer = s.buffer
        scope, dtype, count = str(buffer.scope()), parse_dtype(buffer.dtype), 1
        for size in buffer.shape:
            if type(size).__name__ != "IntImm":
                raise CompileError(f"Vulkan: the size of {buffer.name} is not constant: {size}")
            count *= int(size.value)
        if scope not in _STORAGE:
            raise CompileError(f"Vulkan: {buffer.name} cannot be allocated in {scope} memory")
        volatile = any(str(key).endswith("volatile") and value for key, value in (s.annotations or {}).items())
        view = self.expressions.memory.allocate(_STORAGE[scope], str(buffer.name), dtype, count, volatile=volatile)
        self.expressions.views[hash(buffer)] = view

    def _visit_DeclBuffer(self, s: Stmt) -> None:
        view = self.expressions.view_of(s.data)
        offset = getattr(s.buffer, "elem_offset", None)
        if offset is not None and type(offset).__name__ == "IntImm" and int(offset.value) != 0:
            raise CompileError(f"Vulkan: {s.buffer.name} does not start where its memory does")
        self.expressions.views[hash(s.buffer)] = View(view.memory, parse_dtype(s.buffer.dtype))

    def declare(self, param: Any, buffer: StorageBuffer) -> None:
        """Makes a storage buffer known under a pointer parameter."""
        self.expressions.views[hash(param)] = View(buffer, parse_dtype(param.ty.element_type.dtype))

    # --- threads

    def _visit_AttrStmt(self, s: Stmt) -> None:
        if s.attr_key in ("thread_extent", "virtual_thread"):
            var = s.node.var
            if hash(var) not in self.expressions.variables:
                self.expressions.variables[hash(var)] = self._thread(str(s.node.thread_tag), dtype_of(var), s.value)
        self.visit(s.body)

    def _thread(self, tag: str, dtype: Any, extent: Any) -> Value:
        where, _, axis = tag.partition(".")
        if where not in ("blockIdx", "threadIdx") or axis not in _AXES:
            raise CompileError(f"Vulkan: no thread axis {tag}")
        if where == "threadIdx":
            if type(extent).__name__ != "IntImm":
                raise CompileError(f"Vulkan: the extent of {tag} is not constant: {extent}")
            self.local_size[_AXES[axis]] = int(extent.value)
        if type(extent).__name__ == "IntImm" and int(extent.value) == 1:
            return self.expressions.arithmetic.constant(dtype, 0)
        found = Value(UINT32, (self.builder.component(where, _AXES[axis]),))
        return self.expressions.arithmetic.cast(dtype, found)

    # --- control flow

    def _visit_IfThenElse(self, s: Stmt) -> None:
        b = self.builder
        condition = self.expressions.scalar(s.condition)
        then, merge = b.asm.new_id(), b.asm.new_id()
        otherwise = merge if s.else_case is None else b.asm.new_id()
        b.merge_selection(merge)
        b.branch_if(condition, then, otherwise)
        for label, body in ((then, s.then_case), (otherwise, s.else_case)):
            if body is not None:
                self._block(label, body, merge)
        b.begin(merge)

    def _block(self, label: int, body: Stmt, target: int) -> None:
        """A block with `body` that goes on to `target`."""
        self.builder.begin(label)
        with self.builder.scope():
            self.visit(body)
        self.builder.branch(target)

    def _visit_For(self, s: Stmt) -> None:
        e, b, a = self.expressions, self.builder, self.expressions.arithmetic
        dtype = dtype_of(s.loop_var)
        first, extent = a.cast(dtype, e.visit(s.min)), s.extent
        step = a.constant(dtype, 1) if s.step is None else a.cast(dtype, e.visit(s.step))
        if type(extent).__name__ == "IntImm" and int(extent.value) == 1 and not _jumps(s.body):
            e.variables[hash(s.loop_var)] = first
            self.visit(s.body)
            return
        end = a.cast(dtype, e.visit(extent))
        if not (type(s.min).__name__ == "IntImm" and int(s.min.value) == 0):
            end = a.binary("add", first, end)
        head, body, proceed, merge = (b.asm.new_id() for _ in range(4))
        before = b.block
        b.branch(head)
        b.begin(head)
        with b.scope():
            phi, hole = b.reserve_phi(self.types.vector(dtype, 1))
            current = Value(dtype, (phi,))
            more = a.binary("lt", current, end)
            unrolled = int(s.kind) == _UNROLLED
            b.merge_loop(merge, proceed, LoopControl.UNROLL if unrolled else LoopControl.NONE)
            b.branch_if(more.ids[0], body, merge)
            e.variables[hash(s.loop_var)] = current
            e.index.multiples[hash(s.loop_var)] = 1 if s.step is None else gcd(*map(e.index.multiple, (s.min, s.step)))
            self._loops.append((merge, proceed))
            self._block(body, s.body, proceed)
            self._loops.pop()
            b.begin(proceed)
            following = a.binary("add", current, step)
            b.complete_phi(hole, (first.ids[0], before), (following.ids[0], b.block))
            b.branch(head)
        b.begin(merge)

    def _visit_While(self, s: Stmt) -> None:
        b = self.builder
        head, condition, body, proceed, merge = (b.asm.new_id() for _ in range(5))
        b.branch(head)
        b.begin(head)
        with b.scope():
            b.merge_loop(merge, proceed, LoopControl.NONE)
            b.branch(condition)
            b.begin(condition)
            b.branch_if(self.expressions.scalar(s.condition), body, merge)
            self._loops.append((merge, proceed))
            self._block(body, s.body, proceed)
            self._loops.pop()
            b.begin(proceed)
            b.branch(head)
        b.begin(merge)

    def _visit_Break(self, _: Stmt) -> None:
        self.builder.branch(self._loops[-1][0])

    def _visit_Continue(self, _: Stmt) -> None:
        self.builder.branch(self._loops[-1][1])

    def _visit_Return(self, _: Stmt) -> None:
        self.builder.leave()


def _jumps(s: Stmt) -> bool:
    """Whether a statement may leave or repeat the loop around it."""
    match type(s).__name__:
        case "Break" | "Continue":
            return True
        case "Evaluate":
            return type(s.value).__name__ == "Call" and str(s.value.op.name) in _JUMPS
        case "SeqStmt":
            return any(_jumps(inner) for inner in s.seq)
        case "IfThenElse":
            return _jumps(s.then_case) or (s.else_case is not None and _jumps(s.else_case))
        case "AttrStmt":
            return _jumps(s.body)
    return False
