"""`awq-compile targets`: what can be compiled for, and what of it this machine can build, run and verify."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from awq_compile.cli import options as o
from awq_compile.cli.console import Output


def targets(as_json: o.Json = False, verbose: o.Verbose = False) -> None:
    """List the targets that MODEL can be compiled for, and whether this machine builds, runs and verifies them."""
    from rich.table import Table

    from awq_compile.targets import known_targets, resolve_target
    from awq_compile.verify.execution import missing, unbuildable

    output = Output(as_json, verbose)
    columns = ("target", "library", "scheme", "builds", "runs", "verifies", "compiled for")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1], overflow="fold")
    result: list[dict[str, Any]] = []
    absent: dict[str, str | None] = {}  # by kind of device: each is tried once
    for name in known_targets():
        spec = resolve_target(name)
        kind = str(spec.tvm_target["kind"])
        if spec.has_device_code and kind not in absent:
            absent[kind] = missing(spec)
        build, verify = unbuildable(spec), absent[kind] if spec.has_device_code else None
        verifies = verify is None if spec.has_device_code else spec.runs_here
        words = [str(spec.tvm_target[key]) for key in ("mtriple", "mcpu", "arch") if key in spec.tvm_target]
        marks = ["yes" if yes else "" for yes in (build is None, spec.runs_here, verifies)]
        table.add_row(name, spec.library_suffix, spec.default_scheme, *marks, " ".join(words or [spec.host]))
        found = {"builds_here": build is None, "verifies_here": verifies}
        result.append({**asdict(spec), **found, "missing": [reason for reason in (build, verify) if reason]})
    output.table(table)
    for reason in sorted({reason for entry in result for reason in entry["missing"]}):
        output.say(f"missing: {reason}")
    output.say("cpu is this machine; cpu:TRIPLE takes any LLVM triple, cpu:TRIPLE@CPU one of LLVM's processors.")
    output.say("OpenCL and Vulkan kernels are verified through this machine's drivers, CUDA and Metal ones on its CPU,")
    output.say("CUDA machine code on an NVIDIA GPU where one is here that runs it.")
    output.result(result)
