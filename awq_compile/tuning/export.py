"""A candidate as a file that the TVM runtime of another machine loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from awq_compile.errors import CompileError
from awq_compile.problem import encode_problem
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.link import library_suffix
from awq_compile.tuning.candidate import build
from awq_compile.tuning.foreign import Candidate, encode_candidate
from awq_compile.tuning.measure import Measurement, Work


class Builds(Protocol):
    """Builds candidates elsewhere, many at a time."""

    folder: Path  # of the libraries, by `library_name`

    def begin(self, jobs: Sequence[tuple[Work, Candidate]], limit: float) -> None:
        """Starts building these, which replace those before; `limit`: seconds that one may take."""

    def library(self, work: Work, candidate: Candidate) -> Path | Measurement:
        """Waits for one that was begun: its library in `folder`, or the measurement that says why there is none.

        Raises `EnvironmentMissingError` where nothing is built any more.
        """

    def forget(self) -> None:
        """Removes the libraries; whoever waits for one gets an exception."""

    def close(self) -> None:
        """Ends processes and connections."""


def kernel_suffix(spec: TargetSpec) -> str:
    """Of a library with one kernel. Raises `CompileError` for systems that nothing is linked for here."""
    if (suffix := library_suffix(spec.host)) == ".tar":
        raise CompileError(f"kernels for {spec.name} cannot be measured elsewhere: nothing here links for {spec.host}")
    return suffix


def library_name(work: Work, candidate: Candidate, suffix: str) -> str:
    """Of a candidate's library in a folder of many."""
    words = [encode_problem(work.problem), work.bucket, work.rows, encode_candidate(candidate)]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:24] + suffix


def export_kernel(work: Work, candidate: Candidate, spec: TargetSpec, path: Path) -> None:
    """Builds and links a candidate; `path` has the suffix `kernel_suffix`. Raises what TVM and the linker raise."""
    module = build(work, candidate, spec).module

    def link(output: str, objects: list[str], **_: Any) -> None:
        spec.link(Path(output), sorted(Path(name) for name in objects))

    with spec.building():  # CUDA's code becomes machine code as it is written
        module.export_library(str(path), fcompile=link)
