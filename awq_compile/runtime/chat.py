"""A conversation with a compiled model, on our own runtime; prompts are built as MLC's engines build them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from awq_compile.chat.conv_template import ConvTemplate, Message
from awq_compile.errors import ArtifactError, UsageError
from awq_compile.manifest import CHAT_CONFIG, Dist
from awq_compile.runtime.engine import Engine
from awq_compile.runtime.tokenizer import Tokenizer, unicode_text

Finish = Literal["stop", "max_tokens", "context", "interrupted"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Without `max_tokens` an answer may fill the context window."""

    temperature: float
    top_p: float
    seed: int = 0
    max_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """What was said, and why it ended: a stop token or text, a limit, or the user."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int  # of the prompt, from the turns before
    finish: Finish


def conv_template(dist: Dist) -> ConvTemplate:
    """The conversation template of a DIST."""
    where = f"{dist.path / CHAT_CONFIG}: conv_template"
    return ConvTemplate.from_json(dist.chat_config.get("conv_template"), where, ArtifactError)


def default_sampling(dist: Dist) -> tuple[float, float]:
    """(temperature, top-p) of requests that name none, as MLC reads them from mlc-chat-config.json."""
    found = []
    for key, most in (("temperature", 100.0), ("top_p", 1.0)):
        value = dist.chat_config.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise ArtifactError(f"{dist.path / CHAT_CONFIG}: {key} is {value!r:.80}, expected 0 to {most}")
        found.append(float(value))
    return found[0], found[1]


class Chat:
    """One conversation. The cache keeps the turns before, so an answer costs its own turn only."""

    def __init__(self, dist: Dist, *, system: str | None = None, target: str | None = None) -> None:
        self.template = conv_template(dist)
        self.engine = Engine(dist, target=target)
        self._tokenizer = Tokenizer(dist.path)
        self._begin: list[Message] = [] if system is None else [("system", unicode_text(system, "the system message"))]
        self.last: Answer | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = list(self._begin)

    def answer(
        self, message: str, sampling: Sampling, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yields the answer's text as it comes; when it is complete it is `last`, and both sides are remembered.

        `interrupted` is asked after each token. Raises `UsageError`, with nothing remembered, when the conversation
        does not fit the context window any more.
        """
        asked = [*self.messages, ("user", unicode_text(message, "the message"))]
        prompt = [
            *self.template.system_prefix_token_ids,
            *self._tokenizer.encode(self.template.prompt(asked), special=False),
        ]
        window = self.engine.context_window_size
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= window:
            raise UsageError(
                f"the conversation has {len(prompt)} tokens, and the library's context window is {window}",
                hint="/reset begins a new one; or compile with a larger --context-window-size",
            )
        room = window - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        reused = self.engine.held_prefix(prompt)
        made: list[int] = []
        tokens = self.engine.generate(
            prompt,
            max_tokens=most,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed + len(asked),  # turns draw differently
            stop_ids=self.template.stop_token_ids,
            go_on=True,
        )
        stopped = False

        def counted() -> Iterator[int]:
            nonlocal stopped
            for token in tokens:
                made.append(token)
                yield token
                if stopped := interrupted():
                    return

        said: list[str] = []
        until = StopStrings(self.template.stop_str)
        for piece in until.cut(self._tokenizer.stream(counted(), prompt)):
            said.append(piece)
            yield piece
        limit: Finish = "context" if most == room else "max_tokens"
        finish: Finish = "stop" if until.found or len(made) < most else limit
        text = "".join(said)
        self.last = Answer(text, tuple(made), len(prompt), reused, "interrupted" if stopped else finish)
        self.messages = [*asked, ("assistant", text)]


class StopStrings:
    """Cuts a stream of text before the first of some strings, which may come in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self.found = False

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """The text up to the first string; what may still become one is held back."""
        held = ""
        for piece in pieces:
            held += piece
            ends = [held.index(string) for string in self._strings if string in held]
            if ends:
                self.found = True
                held = held[: min(ends)]
                break
            keep = max((self._begun(held, string) for string in self._strings), default=0)
            if give := held[: len(held) - keep]:
                yield give
            held = held[len(held) - keep :]
        if held:
            yield held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """Length of the longest ending of `text` that `string` begins with."""
        return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)
