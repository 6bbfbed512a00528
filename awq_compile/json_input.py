"""JSON from a stranger. Whatever is wrong with it is one `ValueError`, or one error that names the file."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from awq_compile.errors import AwqCompileError

_MOST_DIGITS: Final = 300  # what a float64 holds
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """The value. Every number is finite and a float64 holds it, and every string is Unicode. Raises `ValueError`."""
    odd: list[str] = []

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            odd.append(f"{text:.40}, expected a finite number")
        return value

    def integer(text: str) -> float:
        if len(text) <= _MOST_DIGITS:
            return int(text)
        odd.append(f"an integer of {len(text)} digits, expected at most {_MOST_DIGITS}")
        return math.inf

    try:
        value = json.loads(text, parse_int=integer, parse_float=number, parse_constant=number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(f"{_first(value, _half)} holds half of a surrogate pair, expected Unicode text") from None
    if odd:
        raise ValueError(
            f"{_first(value, lambda part: isinstance(part, float) and not math.isfinite(part))} is {odd[0]}"
        )
    return value


def _half(part: Any) -> bool:
    return isinstance(part, str) and any("\ud800" <= character <= "\udfff" for character in part)


def _first(value: Any, odd: Callable[[Any], bool]) -> str:
    """Where the first such part of a value is: `rope_scaling.factor`."""
    todo = [("", value)]
    while todo:
        where, part = todo.pop()
        if isinstance(part, dict):
            todo += reversed([(f"{where}.{key}" if where else key, found) for key, found in part.items()])
        elif isinstance(part, list):
            todo += reversed([(f"{where}[{at}]", found) for at, found in enumerate(part)])
        elif odd(part):
            return repr(where)[1:-1] or "the value"
    return "a key"


def read_object(
    path: Path, error: type[AwqCompileError], most_bytes: int, *, hint: str | None = None
) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` for anything else; `hint` is for a file that is not there."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a file")
        if status.st_size > most_bytes:
            raise error(f"{path}: {status.st_size} bytes, and at most {most_bytes} are read")
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist", hint=hint) from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        why = "not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else problem
        raise error(f"{path}: {why}", hint="correct it, or get the file again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
