"""`awq-compile bench DIST`: tokens per second and memory on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, shown


def bench(
    dist: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    target: o.Library = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure prefill and decode speed and memory of a compiled library."""
    from dataclasses import asdict

    from awq_compile.runtime.engine import Engine

    output = Output(as_json, verbose)
    engine = Engine(dist, target=target)
    found = engine.bench(min(prompt_tokens, engine.context_window_size - 1), new_tokens, runs=runs)
    output.say(f"{shown(dist)}: {found.threads} threads, median of {runs} runs (least to most)")
    for name, tokens, speed in (
        ("prefill", found.prefill_tokens, found.prefill),
        ("decode", found.decode_tokens, found.decode),
    ):
        spread = f"({speed.least:.1f} to {speed.most:.1f})"
        output.say(f"  {name:<8} {speed.median:8.1f} tokens/s {spread}, {tokens} tokens")
    output.say(f"  peak memory {nbytes(found.peak_memory_bytes)}")
    output.result(asdict(found))
