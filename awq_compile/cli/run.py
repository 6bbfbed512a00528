"""`awq-compile run DIST --prompt TEXT`: text from a compiled library, on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, piped_text, seconds
from awq_compile.errors import UsageError

DEFAULT_TOKENS: Final = 128


def run(
    dist: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the text; - for stdin.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate.", show_default=str(DEFAULT_TOKENS))
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=o.MAX_SEED, help="Seed of the draws.")] = 0,
    target: o.Library = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Continue a prompt with a compiled library."""
    text = prompt_text(prompt, prompt_file)
    output = Output(as_json, verbose)
    from awq_compile.runtime.engine import Engine
    from awq_compile.runtime.tokenizer import Tokenizer

    engine, tokenizer = Engine(dist, target=target), Tokenizer(dist)
    ids = tokenizer.encode(text)
    room = engine.context_window_size - len(ids)
    tokens = engine.generate(
        ids,
        max_tokens=min(DEFAULT_TOKENS, room) if max_tokens is None and room > 0 else max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=engine.stop_ids,
    )
    made: list[int] = []
    pieces: list[str] = []
    started = time.perf_counter()
    for piece in tokenizer.stream(_kept(tokens, made), ids):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    took = time.perf_counter() - started
    if not as_json:
        print(flush=True)
    output.detail(f"{len(ids)} tokens in, {len(made)} out, {seconds(took)}, {engine.threads} threads")
    output.result({"prompt": text, "text": "".join(pieces), "prompt_tokens": ids, "tokens": made, "seconds": took})


def _kept(tokens: Iterator[int], made: list[int]) -> Iterator[int]:
    """The same tokens, noted in `made`."""
    for token in tokens:
        made.append(token)
        yield token


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from --prompt, --prompt-file, or stdin when it is piped in."""
    if prompt is not None and file is not None:
        raise UsageError("--prompt and --prompt-file are both given", hint="give one of them")
    if prompt is not None:
        text = prompt
    elif file is not None and str(file) != "-":
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read: {error}", hint="--prompt-file FILE takes UTF-8 text") from None
    elif file is not None or not sys.stdin.isatty():
        text = piped_text()
    else:
        raise UsageError("no prompt given", hint='--prompt "Once upon a time", or --prompt-file FILE')
    from awq_compile.runtime.tokenizer import unicode_text

    if not text:
        raise UsageError("the prompt is empty", hint='--prompt "Once upon a time"')
    return unicode_text(text, "the prompt")
