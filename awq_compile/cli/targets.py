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
    table = Table("target", "library", "TVM target", box=None, pad_edge=False)
    result: list[dict[str, Any]] = []
    for name in known_targets():
        spec = resolve_target(name)
        words = " ".join(
            f"{key}={value}" for key, value in spec.tvm_target.items() if not isinstance(value, dict | list)
        )
        table.add_row(name, spec.library_suffix, words)
        result.append(asdict(spec))
    output.table(table)
    output.say("cpu:TRIPLE takes any LLVM triple, for example cpu:aarch64-linux-gnu.")
    output.result(result)
