"""`awq-compile verify DIST`: executes every kernel of every library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, seconds, shown
from awq_compile.errors import EnvironmentMissingError, ExitCode, UsageError

if TYPE_CHECKING:
    from awq_compile.manifest import Dist
    from awq_compile.verify.kernels import KernelVerification


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="TARGET", help="Only its library; repeatable.", show_default="all"),
    ] = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Execute every GPU kernel of a compiled directory, on whatever runs it here, against the float64 reference.

    OpenCL and Vulkan code runs through this machine's drivers. CUDA machine code runs on an NVIDIA GPU that takes it,
    its source on the CPU where there is none (or CUDA_VISIBLE_DEVICES is empty), as Metal's does. Libraries for CPUs
    have no kernels: the main job compares their logits with torch's.
    """
    from awq_compile.manifest import open_dist
    from awq_compile.targets import resolve_target
    from awq_compile.verify.dist import verify_target
    from awq_compile.verify.execution import missing

    output = Output(as_json, verbose)
    dist = open_dist(path)
    dist.library()  # an error where there is none
    dist.verify()
    wanted = [resolve_target(name) for name in target or dist.manifest.libraries]
    kernels = [spec for spec in wanted if spec.has_device_code]
    for spec in wanted:
        dist.library(spec.name)  # an error names the targets that there are
        if not spec.has_device_code:
            output.say(f"{spec.name}: no device kernels")
    if target and not kernels:
        raise UsageError(
            f"{', '.join(target)}: no device kernels to verify", hint="the main job verifies cpu libraries"
        )
    results: dict[str, Any] = {}
    failed, absent = False, None
    for spec in kernels:
        output.step(f"verifying the library for {spec.name}")
        if (reason := missing(spec)) is not None:
            absent = EnvironmentMissingError(f"{spec.name} is not verified: {reason}")
            output.say(str(absent))
            results[spec.name] = {"ran": False, "reason": reason}
            continue
        found = verify_target(dist, spec, output.detail)
        _show(spec.name, dist, found, output)
        failed = failed or not found.passed
        rows = [row.to_json() for row in found.rows]
        results[spec.name] = {**found.to_json(), "device": found.device, "seconds": found.seconds, "rows": rows}
    output.result({"dist": str(path), "passed": not failed and absent is None, "libraries": results})
    if failed:
        raise typer.Exit(ExitCode.FAILED)
    if absent is not None:
        raise absent


def _show(name: str, dist: Dist, found: KernelVerification, output: Output) -> None:
    """A line for the library, and a table of its kernels: those that failed, or all with -v."""
    from rich.table import Table

    good = sum(row.passed for row in found.rows)
    launches = sum(row.launches for row in found.rows)
    output.say(
        f"{name}: {good} of {len(found.rows)} kernels right, {launches} launches, {seconds(found.seconds)}, "
        f"on {found.device} ({shown(dist.library(name))})"
    )
    table = Table("kernel", "against", "largest launch", "error", "bound", "", box=None, pad_edge=False)
    for row in found.rows:
        if output.verbose or not row.passed:
            outcome = "right" if row.passed else row.why
            table.add_row(row.kernel, row.oracle, row.largest, f"{row.error:.1e}", f"{row.bound:.1e}", outcome)
    if table.row_count:
        output.table(table)
    for problem in found.problems:
        output.say(f"  {problem}")
