"""`awq-compile check-contract DIST`: what MLC's runtime would miss, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, shown
from awq_compile.errors import ExitCode


def check_contract(
    path: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare a compiled directory with what the MLC runtime demands: functions, shapes, keys, files and symbols.

    No library is loaded, so those for other machines are checked as well. The main job does this at its end.
    """
    from rich.table import Table

    from awq_compile.contract.check import check_contract as check

    output = Output(as_json, verbose)
    findings = check(path)
    errors = sum(finding.severity == "error" for finding in findings)
    if findings:
        table = Table("", "where", "expected", "found", box=None, pad_edge=False)
        for finding in findings:
            table.add_row(finding.severity, finding.where, finding.expected, finding.found)
        output.table(table)
    for fix in dict.fromkeys(finding.fix for finding in findings):
        output.say(f"what to do: {fix}")
    warnings = len(findings) - errors
    also = f", {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    verdict = f"breaks the contract of the MLC runtime in {errors} place{'s' * (errors != 1)}"
    output.say(f"{shown(path)} {verdict if errors else 'keeps the contract of the MLC runtime'}{also}")
    output.result({"dist": str(path), "passed": errors == 0, "findings": [f.to_json() for f in findings]})
    if errors:
        raise typer.Exit(ExitCode.FAILED)
