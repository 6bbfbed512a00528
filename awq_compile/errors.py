"""The exception tree. Every error meant for a person is an `AwqCompileError`.

A message says what is wrong, where (file, key, tensor), both values, and what to type next (`hint`).
`cli.main` turns them into exit codes in one place; `assert` is for our own bugs only.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    INTERRUPTED = 130


class AwqCompileError(Exception):
    """Base of every error that is shown to the user as one message, without a traceback."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AwqCompileError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = ExitCode.USAGE


class EnvironmentMissingError(AwqCompileError):
    """A compiler, driver, package, device or disk that the job needs is not there."""

    exit_code = ExitCode.ENVIRONMENT


class ModelError(AwqCompileError):
    """The model directory is unusable: its config, its weights or its tokenizer."""


class CalibrationError(AwqCompileError):
    """The calibration text is unusable."""


class CheckpointError(AwqCompileError):
    """A quantised checkpoint is damaged or of another version."""


class ArtifactError(AwqCompileError):
    """A compiled directory (DIST) is damaged or incomplete."""


class CompileError(AwqCompileError):
    """The compiler cannot build what was asked, or one of its own checks failed."""
