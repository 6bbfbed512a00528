"""`awq-compile sweep`: tunes models × schemes × devices, and reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq_compile.cli import options as o
from awq_compile.cli import tune as tuning
from awq_compile.cli.console import Output, shown
from awq_compile.errors import CompileError

if TYPE_CHECKING:
    from awq_compile.tuning.sweep import Cell

File = Annotated[
    Path, typer.Argument(metavar="SWEEP.TOML", help=r"models, schemes and [\[device]] tables; see the README.")
]
Folder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="For the report and for going on.")]


def sweep(file: File, out: Folder = Path("sweep"), as_json: o.Json = False, verbose: o.Verbose = False) -> None:
    """Tune every model with every scheme on every device of a TOML file, here or behind RPC trackers.

    A sweep that is stopped goes on when it is started again. The table and the plots are in DIR/report.html.
    """
    from rich.table import Table

    from awq_compile.artifact import disk_errors
    from awq_compile.tuning.sweep import read_sweep, run_sweep
    from awq_compile.tuning.sweep_report import sweep_html

    output = Output(as_json, verbose)
    cells, results = read_sweep(file), []
    table = Table("cell", "kernels", "speed-up", "")
    with disk_errors(out):
        for result, earlier in run_sweep(cells, out, lambda cell: _tune_cell(cell, output)):
            results.append(result)
            words = f"{result.cell.label}: {result.error}" if result.error else result.cell.label
            output.step(f"{len(results)} of {len(cells)}: {words}")
            speedup = f"{result.speedup:.2f}" if result.kernels else ""
            table.add_row(result.cell.label, str(len(result.kernels)), speedup, "earlier" if earlier else result.error)
            partial = out / ".report.html"
            partial.write_text(sweep_html(results), encoding="utf-8")
            partial.replace(out / "report.html")
    output.table(table)
    output.say(f"in {shown(out / 'report.html')}")
    rows = [
        {"cell": r.cell.label, "kernels": r.kernels, "devices": r.devices, "error": r.error or None} for r in results
    ]
    output.result({"report": str(out / "report.html"), "cells": rows})
    if failed := [result.cell.label for result in results if result.error]:
        raise CompileError(
            f"{len(failed)} of {len(cells)} cells failed",
            hint="mend what each says above, then start the sweep again: it tries them again",
        )


def _tune_cell(cell: Cell, output: Output) -> tuple[list[dict[str, Any]], dict[str, int]]:
    kernels = tuning.Kernels.of(cell.model, cell.device.target, cell.scheme, list(cell.buckets), output)
    limit = cell.seconds
    found = tuning.tune_kernels(kernels, cell.place, cell.trials, limit, cell.seed, cell.patience, output)
    return found["kernels"], found["devices"]
