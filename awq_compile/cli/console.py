"""What commands print: results on stdout, progress on stderr; with --json only JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from awq_compile.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table


@dataclass(frozen=True)
class Output:
    """Where a command's words go."""

    json: bool = False
    verbose: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def people(self) -> Console:
        """For people: stdout, or stderr when stdout carries JSON."""
        from rich.console import Console

        return Console(stderr=self.json, highlight=False, soft_wrap=True)

    @property
    def progress(self) -> Console:
        """For progress: always stderr."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for people."""
        self.people.print(text, markup=False)

    def step(self, text: str) -> None:
        """One line about what is being done now."""
        self.progress.print(text, markup=False, style="dim")

    def detail(self, text: str) -> None:
        """One line that only -v shows."""
        if self.verbose:
            self.progress.print(f"  {text}", markup=False, style="dim")

    def table(self, table: Table) -> None:
        """A table for people."""
        self.people.print(table)

    def result(self, data: Any) -> None:
        """The machine-readable result, printed with --json only."""
        if self.json:
            print(json.dumps(data, indent=2, ensure_ascii=False, default=str), flush=True)

    def bar(self, title: str) -> Bar:
        """A progress bar (plain lines when stderr is not a terminal)."""
        return Bar(title, self)


class Bar:
    """Progress through steps, with the remaining time."""

    def __init__(self, title: str, output: Output) -> None:
        self._title = title
        self._output = output
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def live(self) -> bool:
        """Whether it is drawn in place, so that many updates do no harm."""
        return self._progress is not None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            words, left = (
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.fields[left]}", markup=False),
            )
            self._progress = Progress(words, BarColumn(), TimeElapsedColumn(), left, console=self._output.progress)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, total: int, seconds_left: float | None, message: str) -> None:
        """`done` of `total` steps are finished; what the quantiser calls after every layer."""
        if self._progress is None:
            left = f", about {seconds(seconds_left)} left" if seconds_left is not None and done < total else ""
            self._output.step(f"{self._title}: {message}{left}")
            return
        left = "" if seconds_left is None else f"about {seconds(seconds_left)} left" if done < total else "done"
        if self._task is None:
            self._task = self._progress.add_task(self._title, total=total, left="")
        self._progress.update(
            self._task, completed=done, total=total, description=f"{self._title}, {message}", left=left
        )


def seconds(value: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def piped_text() -> str:
    """All of stdin."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text: {error}") from None


def nbytes(value: float) -> str:
    """`812 B`, `4.2 MB`, `1.1 GB` (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.resolve().is_relative_to(base):
            return f"{prefix}{path.resolve().relative_to(base)}"
    return str(path)
