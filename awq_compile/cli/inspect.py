"""`awq-compile inspect PATH`: what a DIST or a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, shown
from awq_compile.errors import UsageError


def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIST|Q", help="A compiled directory, or a quantised checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file's sha256 with the manifest.")] = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Say what a compiled directory or a checkpoint holds, after checking its names, sizes and offsets."""
    from awq_compile.awq.checkpoint import is_checkpoint

    output = Output(as_json, verbose)
    if is_checkpoint(path):
        if verify:
            raise UsageError(
                "--verify needs a compiled directory; a checkpoint carries no digests", hint="leave --verify out"
            )
        _checkpoint(path, output)
    else:
        _dist(path, verify, output)


def _dist(path: Path, verify: bool, output: Output) -> None:
    from rich.table import Table

    from awq_compile.manifest import open_dist

    dist = open_dist(path)
    if verify:
        dist.verify()
    manifest = dist.manifest
    parameter_bytes = sum(record.nbytes for record in dist.tensors)
    output.say(
        f"{shown(path)}: {manifest.model} as {manifest.scheme}, "
        f"{len(dist.tensors)} parameters, {nbytes(parameter_bytes)}"
    )
    for name, library in manifest.libraries.items():
        output.say(f"  {name}: {library.path}, {nbytes(manifest.files[library.path].nbytes)}")
    given = {key: value for key, value in manifest.options.items() if value is not None and value is not False}
    output.say("  " + ", ".join(f"{key} {value}" for key, value in given.items()))
    output.say("  " + ", ".join(f"{key} {value}" for key, value in manifest.versions.items()))
    if output.verbose:
        table = Table("parameter", "shape", "dtype", "file", "bytes", box=None, pad_edge=False)
        for record in dist.tensors:
            table.add_row(record.name, "×".join(map(str, record.shape)), record.dtype, record.file, str(record.nbytes))
        output.table(table)
    checked = f"{len(manifest.files)} files have the sizes of the manifest" + (", and its digests" if verify else "")
    output.say(f"  {checked}")
    output.result(
        {
            "kind": "dist",
            "model": manifest.model,
            "scheme": manifest.scheme,
            "parameters": len(dist.tensors),
            "parameter_bytes": parameter_bytes,
            "libraries": {name: library.path for name, library in manifest.libraries.items()},
            "options": manifest.options,
            "versions": manifest.versions,
            "digests_checked": verify,
        }
    )


def _checkpoint(path: Path, output: Output) -> None:
    from awq_compile.awq.checkpoint import open_checkpoint
    from awq_compile.cli.quantize import directory_bytes, layer_table

    model = open_checkpoint(path)
    size = directory_bytes(path)
    config = model.config
    output.say(f"{shown(path)}: {config.architecture.hf_name} as {model.scheme.name} ({model.method}), {nbytes(size)}")
    output.say(f"  {config.num_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}")
    output.table(layer_table(model))
    output.result(
        {
            "kind": "checkpoint",
            "architecture": config.architecture.hf_name,
            "scheme": model.scheme.name,
            "method": model.method,
            "nbytes": size,
            "layers": [report.to_json() for report in model.reports],
        }
    )
