"""`awq-compile targets`: what can be compiled for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from awq_compile.cli import options as o
from awq_compile.cli.console import Output


def targets(as_json: o.Json = False, verbose: o.Verbose = False) -> None:
    """List the targets that MODEL can be compiled for."""
    from rich.table import Table

    from awq_compile.targets import known_targets, resolve_target

    output = Output(as_json, verbose)
    table = Table("target", "library", "scheme", "orders", "runs here", "compiled for", box=None, pad_edge=False)
    result: list[dict[str, Any]] = []
    for name in known_targets():
        spec = resolve_target(name)
        words = [str(spec.tvm_target[key]) for key in ("mtriple", "mcpu") if key in spec.tvm_target]
        here = "yes" if spec.runs_here else ""
        table.add_row(name, spec.library_suffix, spec.default_scheme, " ".join(spec.orders), here, " ".join(words))
        result.append(asdict(spec))
    output.table(table)
    output.say("cpu is this machine; cpu:TRIPLE takes any LLVM triple, cpu:TRIPLE@CPU one of LLVM's processors.")
    output.result(result)
