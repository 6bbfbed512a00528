"""Executes every kernel of a library and compares what it leaves behind.

    executor = executor_for(target)
    verification = verify_kernels(library, config, scheme, target, options)
    verification.passed, verification.rows

Kernels are counted from the library's own blob: one that no case executes has failed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from awq_compile.compiler import system_lib_prefix
from awq_compile.errors import ArtifactError, AwqCompileError, EnvironmentMissingError
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cuda_source import check_source
from awq_compile.verify.case import Case, Outcome, arrays_after, call_arguments, judge
from awq_compile.verify.device_code import DeviceModule, library_code
from awq_compile.verify.execution import Loaded, load
from awq_compile.verify.executors.base import Argument, Size3
from awq_compile.verify.launch_table import Table, kernels_of, run_prim_func
from awq_compile.verify.roles import Role, roles
from awq_compile.verify.sidecar import Sidecar, read_sidecar


@dataclass
class KernelRow:
    """One kernel of the blob. `error` and `bound` are of the element nearest to its bound."""

    kernel: str
    function: str = ""
    kind: str = ""
    oracle: str = ""
    launches: int = 0
    largest: str = ""  # grid x block
    error: float = 0.0
    bound: float = 0.0
    why: str = ""

    @property
    def passed(self) -> bool:
        """Executed, and never wrong."""
        return self.launches > 0 and not self.why

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        finite = np.isfinite(self.error)
        return {**self.__dict__, "error": self.error if finite else None, "passed": self.passed}


@dataclass(frozen=True)
class KernelVerification:
    """Outcome for one library. `problems` are failures that belong to no kernel."""

    device: str
    rows: Sequence[KernelRow]
    problems: Sequence[str]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Every kernel executed and right."""
        return bool(self.rows) and not self.problems and all(row.passed for row in self.rows)

    ran: ClassVar[bool] = True

    def words(self) -> str:
        """For people."""
        if self.passed:
            return f"all {len(self.rows)} kernels right, on {self.device}"
        return f"{len(self.failures)} failures among {len(self.rows)} kernels: {self.failures[0]}"

    def to_json(self) -> dict[str, Any]:
        """For the report: no times and no device, so that equal runs give equal bytes."""
        return {
            "ran": True,
            "passed": self.passed,
            "kernels": len(self.rows),
            "launches": sum(row.launches for row in self.rows),
            "failures": self.failures,
        }

    @property
    def failures(self) -> list[str]:
        """One line each."""
        return [*self.problems, *(f"{row.kernel}: {row.why}" for row in self.rows if not row.passed)]


@dataclass
class _Recording:
    """An executor that notes each launch."""

    inner: Loaded
    rows: dict[str, KernelRow]
    launched: list[str] = field(default_factory=list)
    threads: dict[str, int] = field(default_factory=dict)

    def load(self, code: Any) -> None:
        raise AssertionError("loaded already")

    def launch(
        self, kernel: str, args: Sequence[Argument], grid: Size3, block: Size3, *, dynamic_shared: int = 0
    ) -> None:
        self.launched.append(kernel)
        if kernel not in self.rows:
            raise ArtifactError(f"the launch table names the kernel {kernel:.80}, which the library does not have")
        self.inner.launch(kernel, args, grid, block, dynamic_shared)
        row = self.rows[kernel]
        row.launches += int(0 not in grid)
        if (threads := int(np.prod([*grid, *block], dtype=object))) >= self.threads.get(kernel, 0):
            self.threads[kernel] = threads
            row.largest = f"{'x'.join(map(str, grid))} of {'x'.join(map(str, block))}"


def verify_kernels(
    library: Path,
    config: ModelConfig,
    scheme: QuantScheme,
    target: TargetSpec,
    options: CompileOptions,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> KernelVerification:
    """Verifies a library with the files beside it. Raises `EnvironmentMissingError` where nothing can run it here."""
    modules, sidecar = read_library(library)
    prefix = system_lib_prefix(library) if target.system_lib else ""
    known = roles(config, scheme, target, options)
    return verify_code(modules, sidecar, known, target, prefix=prefix, progress=progress)


def read_library(library: Path) -> tuple[list[DeviceModule], Sidecar]:
    """A library's device code and what lies beside it. Raises `ArtifactError` where they do not belong together."""
    sidecar = read_sidecar(library)
    modules = library_code(library)
    if not modules:
        raise ArtifactError(f"{library} holds no device code")
    for module in modules:
        if module.kind == "cuda":
            check_source(sidecar.source, module.code, module.format)
    return modules, sidecar


def verify_code(
    modules: Sequence[DeviceModule],
    sidecar: Sidecar,
    known: Mapping[str, Role],
    target: TargetSpec,
    *,
    prefix: str = "",
    only: str | None = None,
    seconds: float = 300.0,
    progress: Callable[[str], None] = lambda _: None,
) -> KernelVerification:
    """Runs device code by its launch tables. `only` restricts it to the PrimFunc of that name."""
    rows = {name: KernelRow(name) for module in modules for name in module.functions}
    problems: list[str] = []
    named = {name.removeprefix(prefix): table for name, table in sidecar.tables.items()}
    for name, role in known.items() if only is None else ():
        if role.kind in ("linear", "embedding") and name not in named:
            problems.append(f"{name}: the library has no launch table of this planned {role.kind}")
    with load(modules, sidecar.source, target, seconds) as loaded:
        recording = _Recording(loaded, rows)
        for name, table in sorted(named.items()):
            if only is None or name == only:
                progress(name)
                reason = _verify_function(name, table, known.get(name), recording)
                if reason:
                    problems.append(f"{name}: {reason}")
        device = loaded.device
    for row in rows.values():
        if not row.launches and not row.why:
            row.why = "no case executes it"
    shown = [row for row in rows.values() if only is None or row.function == only]
    return KernelVerification(device, sorted(shown, key=lambda row: row.kernel), problems)


def _verify_function(name: str, table: Table, role: Role | None, recording: _Recording) -> str:
    """Runs all cases of a PrimFunc; returns what is wrong with it beyond its kernels."""
    rows = recording.rows
    kernels = kernels_of(table)
    if unknown := [k for k in kernels if k not in rows]:
        return f"its launch table names the kernel {unknown[0]:.80}, which the library does not have"
    for kernel in kernels:
        rows[kernel].function = name
    if role is None:
        return "nothing is known of what this function must compute"
    for kernel in kernels:
        rows[kernel].kind, rows[kernel].oracle = role.kind, role.oracle
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kept: dict[int, Any] = {}
    try:
        for case in role.cases(table, rng):
            recording.launched.clear()
            outcome = _run(table, case, recording, kept)
            for kernel in dict.fromkeys(recording.launched or kernels):
                if kernel in rows:
                    _note(rows[kernel], case, outcome)
            if outcome.reason:
                break  # a broken kernel is broken: its next cases may take long
    except (LookupError, StopIteration, TypeError, ValueError) as error:
        return f"its launch table does not fit the model: {error!r:.200}"
    return ""


def _run(table: Table, case: Case, recording: _Recording, kept: dict[int, Any]) -> Outcome:
    arguments = call_arguments(table, case, kept)
    try:
        run_prim_func(table, recording, arguments)
        after = arrays_after(arguments)
    except EnvironmentMissingError:
        raise
    except AwqCompileError as error:
        return Outcome(np.inf, 0.0, str(error))
    except (MemoryError, OverflowError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return Outcome(np.inf, 0.0, f"its launch table cannot be followed: {error!r:.200}")
    return judge(case, after)


def _note(row: KernelRow, case: Case, outcome: Outcome) -> None:
    if outcome.reason:
        row.why = row.why or f"{case.label}: {outcome.reason}"
        row.error, row.bound = outcome.error, outcome.bound
    elif not row.why and outcome.error * (row.bound or 1.0) >= row.error * (outcome.bound or 1.0):
        row.error, row.bound = outcome.error, outcome.bound
