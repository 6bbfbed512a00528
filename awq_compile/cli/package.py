"""`awq-compile package DIST… -o DIR`: the package configuration of an app with one or several models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, shown
from awq_compile.errors import UsageError


def package(
    dists: Annotated[list[Path], typer.Argument(metavar="DIST…", help="Compiled directories, one for each model.")],
    folder: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to run mlc_llm package in, such as mlc-llm/android/MLCChat."
        ),
    ] = Path(),
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="android or iphone.", show_default="the one that all are compiled for"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a configuration that is there.")] = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Write mlc-package-config.json, from which `mlc_llm package` builds an app's libraries for these models."""
    from awq_compile.artifact import disk_errors
    from awq_compile.deploy.package import DEVICES, PACKAGE_CONFIG, merge
    from awq_compile.manifest import dump_json, open_dist

    output = Output(as_json, verbose)
    if device is not None and device not in DEVICES:
        raise UsageError(f"unknown device {device!r}", hint=f"--device {' or '.join(DEVICES)}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a directory", hint="give the app's folder: -o mlc-llm/android/MLCChat")
    config = merge([open_dist(path) for path in dists], device, folder)
    path = folder / PACKAGE_CONFIG
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(f"{path} exists", hint="--force replaces it (MLC's own lists its sample models)")
    with disk_errors(path):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(dump_json(config), encoding="utf-8")
        partial.replace(path)
    output.say(f"{shown(path)}: {config['device']}")
    for entry in config["model_list"]:
        output.say(f"  {entry['model_id']}, about {nbytes(entry['estimated_vram_bytes'])} when it runs")
    output.say(f"next: cd {shown(folder)} && mlc_llm package")
    output.result({"path": str(path), "config": config})
