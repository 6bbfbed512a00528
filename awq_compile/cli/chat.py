"""`awq-compile chat DIST`: a conversation with a compiled library, on this machine."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, piped_text, seconds, shown
from awq_compile.errors import AwqCompileError, UsageError

if TYPE_CHECKING:
    from awq_compile.manifest import Dist
    from awq_compile.runtime.chat import Answer, Chat, Sampling

_HELP: Final = "/reset begins anew, /exit or Ctrl-D ends; Ctrl-C ends an answer"
_COMMANDS: Final = ("/reset", "/exit", "/help")


def chat(
    dist: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory.")],
    message: Annotated[
        list[str] | None,
        typer.Option(
            "--message",
            "--prompt",
            "-m",
            metavar="TEXT",
            help="Say this and print the answer; repeatable, one turn each.",
            show_default="ask here; all of stdin when it is no terminal",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message.", show_default="the template's")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer.", show_default="what the context window holds")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token each time.", show_default="the model's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Draw from the likeliest tokens of this total.", show_default="the model's"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=o.MAX_SEED, help="Seed of the draws.")] = 0,
    target: o.Library = None,
    engine: Annotated[
        Literal["own", "mlc"], typer.Option(help="Our runtime, or the package mlc_llm where it is installed.")
    ] = "own",
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Converse with a compiled model."""
    from awq_compile.manifest import open_dist

    output = Output(as_json, verbose)
    opened = open_dist(dist)
    if engine == "mlc":
        if message or system is not None or {max_tokens, temperature, top_p} != {None} or seed or as_json:
            raise UsageError("--engine mlc takes --target only: MLC's chat asks for the rest", hint="/set, in its chat")
        _mlc_chat(opened, target, output)
    from awq_compile.runtime.chat import Chat, Sampling, default_sampling

    own = default_sampling(opened)
    sampling = Sampling(own[0] if temperature is None else temperature, own[1] if top_p is None else top_p)
    sampling = Sampling(sampling.temperature, sampling.top_p, seed, max_tokens)
    interactive = message is None and sys.stdin.isatty()
    if interactive and as_json:
        raise UsageError("--json needs a message", hint='--message "Hello"')
    said = message
    if said is None and not interactive:
        said = [piped_text().removesuffix("\n")]  # which `echo` adds
    conversation = Chat(opened, system=system, target=target)
    if said is None:
        _converse(conversation, sampling, opened, output)
        return
    answers = []
    for one in said:
        if not one.strip():
            raise UsageError("the message is empty", hint='--message "Hello"')
        answers.append(_say(conversation, one, sampling, output))
    output.result({"messages": [{"role": r, "content": t} for r, t in conversation.messages], "answers": answers})


def _mlc_chat(dist: Dist, target: str | None, output: Output) -> None:
    from awq_compile.runtime.mlc import find_mlc, hand_over_to

    output.step("looking for MLC's engine")
    found = find_mlc(dist, target)
    if found.warning:
        output.step(found.warning)
    hand_over_to(found.command("chat"))


def _converse(conversation: Chat, sampling: Sampling, dist: Dist, output: Output) -> None:
    """Turns at the terminal. An error of one turn, such as a full context, does not end the conversation."""
    import readline  # noqa: F401 (gives `input` its line editing)

    from awq_compile.chat.conv_template import PLAIN

    output.step(f"{dist.manifest.model} as {dist.manifest.scheme}, {shown(dist.path)}: {_HELP}")
    if conversation.template.name == PLAIN:
        output.step("its conversation template is plain: it goes on from what is typed")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            output.step(f"error: not UTF-8 text: {error}")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            output.step("the conversation begins anew")
        elif line.startswith("/"):
            output.step(_HELP if line == "/help" else f"{line.split()[0]}? known: {', '.join(_COMMANDS)}")
        elif line:
            try:
                with CtrlC() as pressed:
                    _say(conversation, line, sampling, output, pressed)
            except AwqCompileError as error:
                output.step(f"error: {error}" + (f" ({error.hint})" if error.hint else ""))


def _say(
    conversation: Chat, message: str, sampling: Sampling, output: Output, pressed: CtrlC | None = None
) -> dict[str, Any]:
    """Prints the answer as it comes. Returns it as JSON has it."""
    started = time.perf_counter()
    for piece in conversation.answer(message, sampling, (lambda: False) if pressed is None else pressed.once):
        if not output.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    took = time.perf_counter() - started
    if not output.json:
        print(flush=True)
    answer = conversation.last
    assert answer is not None
    if note := _ended(answer, conversation.engine.context_window_size):
        output.step(note)
    rate = f", {len(answer.tokens) / took:.0f} tokens/s" if took else ""
    output.detail(
        f"{answer.prompt_tokens} tokens in ({answer.reused_tokens} of them kept), {len(answer.tokens)} out, "
        f"{seconds(took)}{rate}"
    )
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "finish": answer.finish,
        "seconds": took,
    }


def _ended(answer: Answer, window: int) -> str:
    """Why an answer is not whole; empty when it is."""
    return {
        "stop": "",
        "max_tokens": f"(cut after {len(answer.tokens)} tokens: --max-tokens)",
        "context": f"(cut: the context window of {window} tokens is full; /reset begins a new conversation)",
        "interrupted": "(ended)",
    }[answer.finish]


class CtrlC:
    """Within the block the first Ctrl-C is noted, for the answer to end at its next token; the second interrupts."""

    def __init__(self) -> None:
        self._pressed = False

    def once(self) -> bool:
        """Whether it was pressed."""
        return self._pressed

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
