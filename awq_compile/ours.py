"""Folders of ours beside an output: only what carries our mark is cleared or removed.

The mark is a file that is written first and removed last, so that whatever a kill leaves is known to the next run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from awq_compile.errors import UsageError

MARK: Final = ".awq-compile"


def is_ours(folder: Path) -> bool:
    """Whether it carries the mark, or is empty: a kill may come before the mark."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARK).is_file() or not any(folder.iterdir())


def foreign(folder: Path) -> UsageError:
    """The error for something of the user's where a folder of ours has to be."""
    return UsageError(
        f"{folder} is needed for unfinished work, and awq-compile did not write what is there",
        hint="move it away, or choose another output with -o",
    )


def clear(folder: Path, *kept: str) -> None:
    """Removes what is in a folder of ours, except for the names `kept`."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(folder: Path, *marks: str) -> None:
    """Removes a folder of ours, the files by which it is known last."""
    clear(folder, *marks)
    shutil.rmtree(folder)


def taken(folder: Path) -> bool:
    """Whether something has that name, be it a link that leads nowhere."""
    return os.path.lexists(folder)
