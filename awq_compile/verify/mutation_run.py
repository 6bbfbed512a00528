"""Draws mutants of a built library and runs each in a process of its own: some crash, and some never end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import numpy as np

from awq_compile.compiler import compile_library, system_lib_prefix
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.targets import resolve_target
from awq_compile.targets.base import TargetSpec
from awq_compile.verify.device_code import DeviceModule, library_code
from awq_compile.verify.kernels import verify_code
from awq_compile.verify.launch_table import kernels_of
from awq_compile.verify.mutants import OPERATORS, Mutant, mutants
from awq_compile.verify.roles import Role, roles
from awq_compile.verify.sidecar import Sidecar, read_sidecar

PRESETS: Final = ("opencl", "android", "vulkan", "metal", "cuda:sm_80")
_OPTIONS: Final = CompileOptions(context_window_size=256, prefill_chunk_size=64, max_batch_size=4)
_LAUNCH_SECONDS: Final = 20.0
_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Subject:
    """A built library, taken apart, and what its PrimFuncs must compute."""

    target: TargetSpec
    module: DeviceModule
    sidecar: Sidecar
    known: Mapping[str, Role]
    prefix: str

    @staticmethod
    def build(name: str, folder: Path, config: ModelConfig | None = None) -> Subject:
        """Compiles a model, the demo by default, for a preset."""
        target = resolve_target(name)
        if config is None:
            with as_file(files("awq_compile") / "data" / "demo") as demo:
                config = read_config(demo)
        library = folder / f"lib-{name.replace(':', '-')}{target.library_suffix}"
        scheme = QuantScheme.parse("w4g32")
        compile_library(config, scheme, target, _OPTIONS, library)
        prefix = system_lib_prefix(library) if target.system_lib else ""
        known = roles(config, scheme, target, _OPTIONS)
        return Subject(target, library_code(library)[0], read_sidecar(library), known, prefix)

    def function_of(self) -> dict[str, str]:
        """Kernel → PrimFunc, for the kernels that something calls."""
        return {k: name for name, table in self.sidecar.tables.items() for k in kernels_of(table)}


def draw(subject: Subject, count: int, seed: int, operators: Sequence[str] = OPERATORS) -> Iterator[Mutant]:
    """`count` mutants, operators in turn, of kernels drawn at random among those that the operator applies to."""
    rng = np.random.default_rng(seed)
    functions = subject.function_of()
    names = sorted(functions)
    for number in range(count):
        operator = operators[number % len(operators)]
        for kernel in (names[i] for i in rng.permutation(len(names))):
            beside = kernels_of(subject.sidecar.tables[functions[kernel]])
            found = next(mutants(subject.module, subject.sidecar.source, kernel, beside, operator, rng), None)
            if found is not None:
                yield found
                break


def judge_mutant(subject: Subject, mutant: Mutant) -> str:
    """Why a mutant is caught; empty where it survives."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(subject, mutant, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            return f"still running after {_SECONDS:g} s"
        return str(receiver.recv())
    except EOFError:
        child.join()
        return f"the process ended with exit status {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _child(subject: Subject, mutant: Mutant, sender: Connection) -> None:
    name = subject.function_of()[mutant.kernel].removeprefix(subject.prefix)
    source = mutant.source or subject.sidecar.source
    sidecar, module = Sidecar(subject.sidecar.tables, source), mutant.module
    if module.kind == "cuda":  # faults are put into the source: no GPU is to run the machine code instead
        module = replace(module, format="cuda", code=source.encode())
    try:
        found = verify_code(
            [module],
            sidecar,
            subject.known,
            subject.target,
            prefix=subject.prefix,
            only=name,
            seconds=_LAUNCH_SECONDS,
        )
        sender.send("" if found.passed else found.failures[0])
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    sender.close()
