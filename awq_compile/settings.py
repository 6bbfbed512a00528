"""Every environment variable that awq-compile reads, typed. Raises `UsageError` naming one that does not fit."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from awq_compile.errors import EnvironmentMissingError, UsageError


def cache_dir() -> Path:
    """For what can be made again: `$AWQ_COMPILE_CACHE`, `$XDG_CACHE_HOME/awq-compile` or `~/.cache/awq-compile`."""
    if own := os.environ.get("AWQ_COMPILE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "awq-compile"


def cache_folder(*names: str) -> Path:
    """A folder below `cache_dir`, made if need be. Raises `EnvironmentMissingError` where it cannot be."""
    folder = cache_dir().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissingError(
            f"the cache folder {folder} cannot be made: {error.strerror}", hint="export AWQ_COMPILE_CACHE=DIR"
        ) from None
    return folder


def num_threads() -> int:
    """CPU threads to use: `$AWQ_COMPILE_THREADS`, else the processors this process may run on."""
    if own := os.environ.get("AWQ_COMPILE_THREADS"):
        if not re.fullmatch(r"[1-9][0-9]{0,4}", own):
            raise UsageError(
                f"AWQ_COMPILE_THREADS is {own!r:.60}, expected 1 to 99999",
                hint="export AWQ_COMPILE_THREADS=4, or unset it",
            )
        return int(own)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def linker() -> list[str]:
    """Command of a compiler driver that links for the target, `$AWQ_COMPILE_LINKER`, in words; empty for zig."""
    own = os.environ.get("AWQ_COMPILE_LINKER", "")
    try:
        return shlex.split(own)
    except ValueError as error:
        raise UsageError(
            f"AWQ_COMPILE_LINKER is {own!r:.80}, which is no command line: {error}",
            hint="export AWQ_COMPILE_LINKER='aarch64-linux-gnu-gcc -O2', or unset it",
        ) from None


def mlc_python() -> str:
    """A Python that has the package mlc_llm: `$AWQ_COMPILE_MLC_PYTHON`, else the one that runs this."""
    return os.environ.get("AWQ_COMPILE_MLC_PYTHON") or sys.executable


def environment() -> dict[str, str]:
    """The environment that programs we start are given."""
    return dict(os.environ)
