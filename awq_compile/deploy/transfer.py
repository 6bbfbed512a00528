"""Sends the files of a plan, one by one, so that an interrupted transfer goes on at the file where it stopped.

A file is pushed to a staging folder that adb may write, moved into the model's folder under a temporary name,
hashed there, and only then renamed: under its own name a file is always whole.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from awq_compile.deploy.adb import RESUME, Adb
from awq_compile.deploy.device import STAGE
from awq_compile.deploy.plan import ModelFile, Plan
from awq_compile.errors import ArtifactError, AwqCompileError, EnvironmentMissingError
from awq_compile.manifest import CHAT_CONFIG, file_sha256

Progress = Callable[[int, int, float | None, str], None]  # bytes done, bytes of all, seconds left, what

_FOLDER: Final = f"{STAGE}/awq-compile"
_BATCH: Final = 16  # names in one command: old phones take 4 KB


def digests(adb: Adb, folder: str) -> dict[str, str]:
    """sha256 by name of the files in a folder of the phone; none where the folder is not there."""
    names = [n for n in adb.try_shell("ls", "-1", folder).splitlines() if re.fullmatch(r"[\w.+-]+", n, re.ASCII)]
    found = {}
    for batch in _batches(names):
        for line in adb.try_shell("sha256sum", *(f"{folder}/{name}" for name in batch)).splitlines():
            digest, _, path = line.partition("  ")
            if re.fullmatch(r"[0-9a-f]{64}", digest):
                found[path.removeprefix(f"{folder}/")] = digest
    return found


def send(adb: Adb, plan: Plan, folder: str, progress: Progress) -> None:
    """Makes the model's folder hold the plan's files; raises with what to do when it cannot."""
    if not plan.send and not plan.remove:
        return
    for file in plan.send:
        if (found := file_sha256(file.path)) != file.sha256:
            raise ArtifactError(
                f"{file.path}: sha256 is {found}, and the manifest says {file.sha256}",
                hint="the file was changed or damaged: compile again",
            )
    # Without its configuration the app takes the model for absent, and does not load half of two versions.
    config, held = f"{folder}/{CHAT_CONFIG}", f"{folder}/.{CHAT_CONFIG}.held"
    kept = any(file.name == CHAT_CONFIG for file in plan.keep)
    hide = ["mv", "-f", config, held] if kept else ["rm", "-f", config]
    adb.change(["mkdir", "-p", _FOLDER, folder], hide)
    for batch in _batches(list(plan.remove)):
        adb.change(["rm", "-f", *(f"{folder}/{name}" for name in batch)])
    started, done = time.monotonic(), 0
    try:
        for file in plan.send:
            _send_file(adb, file, folder)
            done += file.nbytes
            left = (time.monotonic() - started) / max(done, 1) * (plan.nbytes - done)
            progress(done, plan.nbytes, left, file.name)
        adb.change(["mv", "-f", held, config] if kept else ["rm", "-f", held])
    finally:
        with suppress(AwqCompileError):  # the phone may be gone
            adb.change(["rm", "-rf", _FOLDER])


def _send_file(adb: Adb, file: ModelFile, folder: str) -> None:
    staged, arriving = f"{_FOLDER}/{file.name}.part", f"{folder}/.{file.name}.part"
    adb.push(str(file.path.resolve()), staged)
    answer = adb.change(["mv", "-f", staged, arriving], ["sha256sum", arriving])
    if not adb.dry_run and answer[:64] != file.sha256:
        adb.change(["rm", "-f", arriving])
        raise EnvironmentMissingError(
            f"{file.name} arrived with sha256 {answer[:64]}, and {file.sha256} was sent", hint=RESUME
        )
    adb.change(["mv", "-f", arriving, f"{folder}/{file.name}"])


def _batches(names: list[str]) -> Iterator[list[str]]:
    yield from (names[i : i + _BATCH] for i in range(0, len(names), _BATCH))
