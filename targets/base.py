"""`TargetSpec`: one page of data about a device, and what building for it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from awq_compile import settings
from awq_compile.errors import UsageError
from awq_compile.formats import QuantScheme
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import LinearSchedule
from awq_compile.targets.link import link_shared


@dataclass(frozen=True)
class TargetSpec(ABC):
    """What the compiler knows of a target.

    `name` is what the user types (`cpu`, `cpu:aarch64-linux-gnu`); `tvm_target` the argument of
    `tvm.target.Target`, `host` the LLVM triple of the host code; `dtype` that of activations and KV cache;
    `library_suffix` is `.so`, `.dylib`, `.dll`, or `.tar` for objects that the user links, with the symbol
    prefix of a system library where `system_lib` is set; `default_scheme` is taken without `--scheme`.
    `orders` are those of packed weights that it reads, the preferred one first.
    `machine` names the limits that schedules depend on: targets with the same `machine` share records.
    """

    name: str
    tvm_target: dict[str, object]
    host: str
    dtype: str
    library_suffix: str
    system_lib: bool
    default_scheme: str
    orders: tuple[str, ...]
    machine: str
    runs_here: bool

    @abstractmethod
    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """The untuned schedule of a problem."""

    def check_scheme(self, scheme: QuantScheme) -> None:
        """Raises `UsageError` for weights in an order that the target does not read."""
        if scheme.linear.order not in self.orders:
            other = scheme.in_order(self.orders[0]).name
            raise UsageError(
                f"{self.name} reads weights in the order {' or '.join(self.orders)}, and {scheme.name} has them in "
                f"{scheme.linear.order}",
                hint=f"--scheme {other}, in a DIST of its own: the codes are the same",
            )

    def check_tools(self) -> None:
        """Raises `EnvironmentMissingError` naming what to install where compiling needs what this machine lacks.

        Also `UsageError`, for settings that compiling and checking read later.
        """
        settings.linker(), settings.num_threads()

    @property
    def has_device_code(self) -> bool:
        """Whether kernels run on a device of their own, with threads to bind."""
        return self.tvm_target["kind"] != "llvm"

    @property
    def block_threads(self) -> int:
        """Threads of a block for elementwise kernels; 0 where loops run on the host."""
        return 0

    def building(self) -> AbstractContextManager[object]:
        """Within this, TVM builds and exports for the target."""
        return nullcontext()

    def link(self, output: Path, objects: list[Path]) -> None:
        """Links object files into a library at `output`."""
        link_shared(self.host, output, objects)
