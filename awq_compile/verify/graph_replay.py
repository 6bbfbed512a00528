"""What TVM's CUDA runtime does with captured functions, where there is no CUDA (src/runtime/vm/cuda of TVM).

A graph keeps the addresses that its kernels got while it was recorded. So does a replay here: it calls the function
with the arguments of the first call, whatever those of a later call are, and gives the first call's results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GraphReplay:
    """For one virtual machine, which knows every captured function by an index."""

    allocated: dict[int, Any] = field(default_factory=dict)
    recorded: dict[tuple[int, ...], tuple[tuple[Any, ...], Any]] = field(default_factory=dict)

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """The global functions that a virtual machine calls, by name."""
        return {
            "vm.builtin.cuda_graph.get_cached_alloc": self.get_cached_alloc,
            "vm.builtin.cuda_graph.run_or_capture": self.run_or_capture,
        }

    def get_cached_alloc(self, vm: Any, function: Any, index: int) -> Any:
        """The memory that the function allocates at the first call."""
        if index not in self.allocated:
            self.allocated[index] = _invoke(vm, function)
        return self.allocated[index]

    def run_or_capture(self, vm: Any, function: Any, arguments: Any, index: int, sizes: Any = ()) -> Any:
        """Runs the function; the values of symbolic sizes tell recordings apart."""
        key = (index, *map(int, sizes))
        if key in self.recorded:
            first, results = self.recorded[key]
            _invoke(vm, function, *first)
            return results
        first = tuple(arguments)
        results = _invoke(vm, function, *first)
        self.recorded[key] = first, results
        return results


def _invoke(vm: Any, function: Any, *arguments: Any) -> Any:
    """Calls a function of the virtual machine `vm`, a pointer."""
    from awq_compile.runtime.lean_tvm import tvm

    return tvm.get_global_func("vm.builtin.invoke_closure")(vm, function, *arguments)
