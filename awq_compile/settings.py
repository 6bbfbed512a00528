"""Every environment variable that awq-compile reads, typed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def cache_dir() -> Path:
    """For what can be made again: `$AWQ_COMPILE_CACHE`, `$XDG_CACHE_HOME/awq-compile` or `~/.cache/awq-compile`."""
    if own := os.environ.get("AWQ_COMPILE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "awq-compile"


def num_threads() -> int:
    """CPU threads to use: `$AWQ_COMPILE_THREADS`, else the processors this process may run on."""
    if own := os.environ.get("AWQ_COMPILE_THREADS"):
        return max(1, int(own))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def linker() -> list[str]:
    """Command of a compiler driver that links for the target, `$AWQ_COMPILE_LINKER`, in words; empty for zig."""
    return shlex.split(os.environ.get("AWQ_COMPILE_LINKER", ""))


def mlc_python() -> str:
    """A Python that has the package mlc_llm: `$AWQ_COMPILE_MLC_PYTHON`, else the one that runs this."""
    return os.environ.get("AWQ_COMPILE_MLC_PYTHON") or sys.executable


def environment() -> dict[str, str]:
    """The environment that programs we start are given."""
    return dict(os.environ)
