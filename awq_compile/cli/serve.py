"""`awq-compile serve DIST`: an OpenAI-compatible server, by the package mlc_llm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output


def serve(
    dist: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    mode: Annotated[
        Literal["local", "interactive", "server"],
        typer.Option(help="How much memory MLC takes: for a few requests, for one, or all."),
    ] = "local",
    target: o.Library = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Serve a compiled model by MLC's own engine (the package mlc_llm), as OpenAI's API."""
    from awq_compile.manifest import open_dist
    from awq_compile.runtime.mlc import find_mlc, hand_over_to

    output = Output(as_json, verbose)
    output.step("looking for MLC's engine")
    found = find_mlc(open_dist(dist), target)
    if found.warning:
        output.step(found.warning)
    command = found.command("serve", "--mode", mode, "--host", host, "--port", str(port))
    output.detail(" ".join(command))
    output.result({"command": command})
    hand_over_to(command)
