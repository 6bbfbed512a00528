"""A Python process that answers requests: a driver that crashes or never returns takes only that process with it.

A message is a u32 length, a JSON header with `sizes`, and that many byte strings.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

Answer = tuple[dict[str, Any], list[bytes]]


class ChildLostError(Exception):
    """The process ended, or was ended because it took too long; says how."""


class Child:
    """Runs `python -m MODULE ARGUMENTS`, which calls `serve`. `pass_fds` are open files that it inherits."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, pass_fds=pass_fds)
        weakref.finalize(self, _end, self._process)

    def ask(self, header: Mapping[str, Any], blobs: Sequence[Any], seconds: float) -> Answer:
        """The answer to one request. Raises `ChildLostError`, after which there is no child."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin, header, blobs)
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    self.close()
                    raise ChildLostError(f"is still running after {seconds:g} s")
            return receive(process.stdout)
        except (EOFError, OSError):
            code = process.wait()
            self.close()
            raise ChildLostError(f"ends its process with exit status {code}") from None

    def close(self) -> None:
        """Ends the process."""
        _end(self._process)


def serve(answer: Callable[[dict[str, Any], list[bytes]], Answer]) -> None:
    """In the child: answers until stdin closes. What a driver prints goes to stderr."""
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request, blobs = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send(answers, *answer(request, blobs))
        except Exception as error:  # a driver raises what it likes: the parent reports it
            send(answers, {"error": f"{type(error).__name__}: {error}"}, [])


def send(pipe: Any, header: Mapping[str, Any], blobs: Sequence[Any]) -> None:
    """Writes one message."""
    text = json.dumps({**header, "sizes": [len(b) for b in blobs]}).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    for blob in blobs:
        pipe.write(blob)
    pipe.flush()


def receive(pipe: Any) -> Answer:
    """Reads one message. Raises `EOFError` when the other side is gone."""

    def exactly(count: int) -> bytes:
        data = pipe.read(count)
        if len(data) != count:
            raise EOFError
        return bytes(data)

    header = json.loads(exactly(struct.unpack("<I", exactly(4))[0]))
    return header, [exactly(size) for size in header.pop("sizes")]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
