"""`awq-compile bench DIST`: tokens per second and memory on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, shown
from awq_compile.errors import UsageError

DEFAULT_PROMPT: Final = 128
DEFAULT_NEW: Final = 64


def bench(
    dist: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt.", show_default=str(DEFAULT_PROMPT))
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate.", show_default=str(DEFAULT_NEW))
    ] = None,
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
    window = engine.context_window_size
    new = new_tokens or max(1, min(DEFAULT_NEW, window // 2))
    prompt = prompt_tokens or max(1, min(DEFAULT_PROMPT, window - new))
    if prompt + new > window:
        raise UsageError(
            f"--prompt-tokens {prompt} and --new-tokens {new} do not fit the library's context window of {window}",
            hint=f"--prompt-tokens {window - new}" if new < window else f"--new-tokens {max(1, window // 2)}",
        )
    found = engine.bench(prompt, new, runs=runs)
    output.say(f"{shown(dist)}: {found.threads} threads, median of {runs} runs (least to most)")
    for name, tokens, speed in (
        ("prefill", found.prefill_tokens, found.prefill),
        ("decode", found.decode_tokens, found.decode),
    ):
        spread = f"({speed.least:.1f} to {speed.most:.1f})"
        output.say(f"  {name:<8} {speed.median:8.1f} tokens/s {spread}, {tokens} tokens")
    output.say(f"  peak memory {nbytes(found.peak_memory_bytes)}")
    output.result(asdict(found))
