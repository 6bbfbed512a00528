"""`TargetSpec`: one page of data about a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from awq_compile.problem import MatmulProblem
from awq_compile.schedules import LinearSchedule


@dataclass(frozen=True)
class TargetSpec(ABC):
    """What the compiler knows of a target.

    `name` is what the user types (`cpu`, `cpu:aarch64-linux-gnu`); `tvm_target` the argument of
    `tvm.target.Target`; `dtype` that of activations and KV cache; `library_suffix` is `.so`, `.dylib`,
    `.dll`, or `.tar` for objects that the user links; `default_scheme` is taken without `--scheme`.
    `machine` names the limits that schedules depend on: targets with the same `machine` share records.
    """

    name: str
    tvm_target: dict[str, object]
    dtype: str
    library_suffix: str
    default_scheme: str
    machine: str
    runs_here: bool

    @abstractmethod
    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """The untuned schedule of a problem."""

    @abstractmethod
    def link(self, output: Path, objects: list[Path]) -> None:
        """Links object files into a library at `output`."""
