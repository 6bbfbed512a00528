"""Text to tokens and back, from the tokenizer files of a DIST."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as _HFTokenizer

from awq_compile.errors import ArtifactError, UsageError

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"  # what tokenizers puts for bytes that are no character (yet)


def unicode_text(text: str, what: str) -> str:
    """The text. Raises `UsageError` for bytes of a command line or a stream that are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not Unicode text: {error}", hint="give it in UTF-8") from None
    return text


class Tokenizer:
    """`tokenizer.json` of a directory."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", hint="compile again, or copy the whole directory")
        try:
            self._tokenizer: Any = _HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"{path} is damaged: {error}") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` are the tokens that the tokenizer puts before a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self, tokens: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        """Pieces of text as tokens arrive; `after` are the tokens before, whose text is not repeated.

        A character whose bytes come in several tokens is held until it is whole.
        """
        decoder = StreamDecoder(self, after)
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.flush():
            yield rest


class StreamDecoder:
    """Decodes token by token.

    A token's text depends on its neighbours (a leading space, the bytes of a character), so a window of
    tokens is decoded, and what is new beyond the text already given is the piece.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(after)[-8:]
        self._given = len(self._window)  # tokens of the window whose text has been given

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._window.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What is still held, at the end."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._window)
        given = self._tokenizer.decode(self._window[: self._given])
        if len(text) <= len(given) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text[len(given) :]
