"""Decoding replays its kernels as CUDA graphs: TVM's `RewriteCUDAGraph`, on the functions that decode alone.

    rms_norm(x, w, a); matmul(a, packed, b)                        kernels on planned memory, between two attentions
    → b = run_or_capture(decode_cuda_graph_capture_1, (x, w), 1)   records them at the first call, later replays them
      storage = get_cached_alloc(cuda_graph_alloc, 0)              memory that stays where it is, for all functions

A graph keeps addresses and sizes. So it has kernels only whose arguments never move: the weights, and planned memory.
What reads the function's other arguments or writes its result stays outside, and so does attention over the paged
cache: it splits a step into one graph per layer. Each value of a symbolic size in `sizes` gets graphs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import tvm
from tvm import relax

from awq_compile.errors import CompileError
from awq_compile.passes.base import IRModule, RelaxPass, bindings_of, relax_functions

_SIZES: Final = "relax.rewrite_cuda_graph.capture_symbolic_vars"
_CAPTURED: Final = "_cuda_graph_capture"  # in the names of the functions that TVM lifts out


@dataclass(frozen=True)
class CaptureGraphs(RelaxPass):
    """After memory is planned, before tensors are lowered to storages. Weights are the arguments behind `num_input`."""

    functions: tuple[str, ...]
    sizes: tuple[str, ...] = ()

    def run(self, module: IRModule) -> IRModule:
        chosen = {var: f for var, f in relax_functions(module) if str(var.name_hint) in self.functions}
        others = {var: f for var, f in relax_functions(module) if var not in chosen}
        inside = {var: f for var, f in module.functions.items() if var not in others}
        inside |= {var: f.with_attr(_SIZES, list(self.sizes)) for var, f in chosen.items()}
        with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
            rewritten = relax.transform.RewriteCUDAGraph()(tvm.IRModule(inside, attrs=module.attrs))
        return tvm.IRModule({**dict(rewritten.functions.items()), **others}, attrs=module.attrs)


def captured_kernels(module: IRModule) -> Iterator[tuple[str, str]]:
    """(captured function, PrimFunc that it calls)"""
    for var, function in relax_functions(module):
        if _CAPTURED in str(var.name_hint):
            for binding in bindings_of(function):
                callee = getattr(binding.value, "op", None)
                if isinstance(callee, tvm.ir.GlobalVar):
                    yield str(var.name_hint), str(callee.name_hint)


def check_captured(module: IRModule, tables: Mapping[str, Any]) -> None:
    """Raises `CompileError` for a captured kernel with a workspace: the runtime may move that between replays.

    `tables` are the launch tables of `verify.launch_table`.
    """
    for function, kernel in captured_kernels(module):
        if kernel in tables and _allocates(tables[kernel]["body"]):
            raise CompileError(
                f"{kernel} needs a workspace, which {function} cannot keep in place", hint="leave out --cuda-graphs"
            )


def _allocates(body: list[Any]) -> bool:
    """Whether a block of a launch table allocates, in its branches and loops too."""
    return any(
        statement[0] == "alloc"
        or any(isinstance(part, list) and part and isinstance(part[0], list) and _allocates(part) for part in statement)
        for statement in body
    )
