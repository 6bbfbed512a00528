"""Records launch tables while TVM builds: a pass instrument that reads host code right after it is split off.

recorder = LaunchRecorder()
with PassContext(instruments=[recorder.instrument()]):
    relax.build(…)
recorder.tables["name of a PrimFunc"]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from awq_compile.errors import CompileError
from awq_compile.targets.cuda_launch import TAG
from awq_compile.verify.launch_table import Table

_BINARY: Final = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Mod": "mod",
    "FloorDiv": "floordiv",
    "FloorMod": "floormod",
    "Min": "min",
    "Max": "max",
    "EQ": "eq",
    "NE": "ne",
    "LT": "lt",
    "LE": "le",
    "GT": "gt",
    "GE": "ge",
    "And": "and",
    "Or": "or",
    "LShift": "shift_left",
    "RShift": "shift_right",
    "BitwiseAnd": "bitwise_and",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
}
_CALLS: Final = ("shift_left", "shift_right", "bitwise_and", "bitwise_or", "bitwise_xor")
_FLAGS: Final = (TAG, "tirx.use_cooperative_launch")  # take no launch argument
_DYNAMIC_SHARED: Final = "tirx.use_dyn_shared_memory"


@dataclass(frozen=True)
class LaunchRecorder:
    """`tables`: PrimFunc → launch table, for every host function that launches a kernel."""

    tables: dict[str, Table] = field(default_factory=dict)

    def instrument(self) -> Any:
        """The instrument to give to `PassContext`."""
        import tvm

        tables = self.tables

        @tvm.instrument.pass_instrument
        class Record:
            def run_after_pass(self, module: Any, info: Any) -> None:
                if str(info.name) == "tirx.SplitHostDevice":
                    tables.update(launch_tables(module))

        return Record()


def launch_tables(module: Any) -> dict[str, Table]:
    """The tables of a module as `SplitHostDevice` leaves it. Raises `CompileError` on host code beyond a table."""
    from tvm import tirx

    functions = {str(v.name_hint): f for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    kernels = {}
    for name, function in functions.items():
        if "tirx.kernel_launch_params" in function.attrs and int(function.attrs.get("calling_conv", 0)) == 2:
            symbol = str(function.attrs.get("global_symbol", name))
            tags = [str(t) for t in function.attrs["tirx.kernel_launch_params"]]
            kernels[symbol] = (len(function.params), tags)
    tables = {}
    for name, function in functions.items():
        if name in kernels or int(function.attrs.get("calling_conv", 0)) == 2:
            continue
        symbol = str(function.attrs.get("global_symbol", name))
        reader = _HostReader(symbol, kernels)
        try:
            params = [reader.param(p) for p in function.params]
            body = reader.statement(function.body)
        except CompileError:
            text = function.script()
            if any(kernel in text for kernel in kernels):
                raise
            continue  # host code that computes a size, say, and launches nothing
        if reader.launches:
            tables[symbol] = {"name": symbol, "params": params, "body": body}
    return tables


class _HostReader:
    """Reads one host function. Names are made unique, for TIR tells variables apart by identity."""

    def __init__(self, name: str, kernels: dict[str, tuple[int, list[str]]]) -> None:
        self.name = name
        self.kernels = kernels
        self.launches = 0
        self.names: dict[Any, str] = {}
        self.taken: set[str] = set()
        self.same_data: dict[str, str] = {}  # buffer → the one whose memory it shows

    def refuse(self, what: str) -> CompileError:
        return CompileError(f"the host code of {self.name} holds {what}, which a launch table cannot say")

    def var(self, var: Any) -> str:
        if var not in self.names:
            base = name = str(var.name)
            count = 0
            while name in self.taken:
                count += 1
                name = f"{base}.{count}"
            self.taken.add(name)
            self.names[var] = name
        return self.names[var]

    def param(self, var: Any) -> dict[str, Any]:
        kind = var.ty
        if not hasattr(kind, "shape"):
            return {"name": self.var(var), "dtype": str(kind.dtype)}
        found: dict[str, Any] = {"name": self.var(var), "dtype": str(kind.dtype)}
        found["shape"] = [self.expr(e) for e in kind.shape]
        if len(kind.strides):
            found["strides"] = [self.expr(e) for e in kind.strides]
        if kind.elem_offset is not None and (offset := self.expr(kind.elem_offset)) != 0:
            found["elem_offset"] = offset
        return found

    def statement(self, node: Any) -> list[Any]:
        kind = type(node).__name__
        if kind == "SeqStmt":
            return [s for part in node.seq for s in self.statement(part)]
        if kind == "Bind":
            return [["let", self.var(node.var), self.expr(node.value)]]
        if kind == "AllocBuffer":
            shape = [self.expr(e) for e in node.buffer.shape]
            return [["alloc", self.var(node.buffer), str(node.buffer.dtype), shape]]
        if kind == "DeclBuffer":
            self.same_data[self.var(node.buffer)] = self.buffer(node.data)
            return []
        if kind == "IfThenElse":
            other = self.statement(node.else_case) if node.else_case is not None else []
            return [["if", self.expr(node.condition), self.statement(node.then_case), other]]
        if kind == "For":
            name = self.var(node.loop_var)
            return [["for", name, self.expr(node.min), self.expr(node.extent), self.statement(node.body)]]
        if kind == "AttrStmt":
            return self.statement(node.body)
        if kind == "AssertStmt":
            return self.statement(node.body) if hasattr(node, "body") else []
        if kind == "Evaluate":
            return self.evaluate(node.value)
        raise self.refuse(f"a {kind}")

    def evaluate(self, node: Any) -> list[Any]:
        if type(node).__name__ != "Call":
            return []
        first = node.args[0] if len(node.args) else None
        kernel = str(getattr(first, "value", ""))
        if kernel not in self.kernels:
            raise self.refuse(f"a call of {getattr(node.op, 'name', node.op)} {kernel}".rstrip())
        self.launches += 1
        count, tags = self.kernels[kernel]
        args, extents = list(node.args[1 : 1 + count]), list(node.args[1 + count :])
        sizes = dict(zip([t for t in tags if t not in _FLAGS], [self.expr(e) for e in extents], strict=True))
        buffers = [self.buffer(a) for a in args if _is_pointer(a)]
        scalars = [self.expr(a) for a in args if not _is_pointer(a)]
        launch = {
            "kernel": kernel,
            "buffers": buffers,
            "scalars": scalars,
            "grid": [sizes.get(f"blockIdx.{axis}", 1) for axis in "xyz"],
            "block": [sizes.get(f"threadIdx.{axis}", 1) for axis in "xyz"],
        }
        if _DYNAMIC_SHARED in sizes:
            launch["dynamic_shared"] = sizes[_DYNAMIC_SHARED]
        return [["launch", launch]]

    def buffer(self, node: Any) -> str:
        """Name of the argument or workspace whose memory `node` points to."""
        if type(node).__name__ == "Call" and len(node.args) == 1:
            node = node.args[0]
        if node not in self.names:
            raise self.refuse(f"the pointer {node}")
        name = self.names[node]
        while name in self.same_data:
            name = self.same_data[name]
        return name

    def expr(self, node: Any) -> Any:
        if isinstance(node, bool | int | float):
            return node
        kind = type(node).__name__
        if kind in ("IntImm", "FloatImm"):
            return bool(node.value) if str(node.ty.dtype) == "bool" else node.value
        if kind == "Var":
            return ["var", self.var(node)]
        if kind in _BINARY:
            return [_BINARY[kind], self.expr(node.a), self.expr(node.b)]
        if kind == "Not":
            return ["not", self.expr(node.a)]
        if kind == "Cast":
            return ["cast", str(node.ty.dtype), self.expr(node.value)]
        if kind == "Select":
            return ["select", self.expr(node.condition), self.expr(node.true_value), self.expr(node.false_value)]
        if kind == "Call":
            name = str(node.op.name).rpartition(".")[2]
            if name == "if_then_else":
                return ["select", *(self.expr(a) for a in node.args)]
            if name in _CALLS:
                return [name, *(self.expr(a) for a in node.args)]
            if name in ("likely", "ret"):
                return self.expr(node.args[0])
        raise self.refuse(f"the expression {node} ({kind})")


def _is_pointer(node: Any) -> bool:
    kind = type(node.ty).__name__
    return kind in ("PointerType", "BufferType")
