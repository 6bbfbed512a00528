"""What to send: pure functions of a DIST and of what the phone says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from awq_compile.deploy.device import STORAGE
from awq_compile.deploy.package import device_of, model_id
from awq_compile.errors import ArtifactError, EnvironmentMissingError, UsageError
from awq_compile.manifest import CHAT_CONFIG, TENSOR_CACHE, Dist, json_field

DEFAULT_APP: Final = "ai.mlc.mlcchat"

_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")  # no folder, nothing that begins like an option
_SHARD: Final = re.compile(r"params_shard_\d+\.bin")


@dataclass(frozen=True)
class ModelFile:
    """A file of the model, and the digest that it must have on the phone."""

    path: Path
    nbytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Within the model's folder, here and there."""
        return self.path.name


@dataclass(frozen=True)
class Plan:
    """`send` in this order; `keep` are there already; `remove` are shards of another version."""

    send: tuple[ModelFile, ...]
    keep: tuple[ModelFile, ...]
    remove: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of all that is sent."""
        return sum(file.nbytes for file in self.send)

    @property
    def largest(self) -> int:
        """Bytes of the largest file that is sent: what lies on the phone twice for a moment."""
        return max((file.nbytes for file in self.send), default=0)


def app_folder(app: str) -> str:
    """Where an Android app keeps its models: its `getExternalFilesDir`."""
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", app, re.ASCII):
        raise UsageError(f"{app!r} is not the name of an Android package", hint=f"for example --app {DEFAULT_APP}")
    return f"{STORAGE}/Android/data/{app}/files"


def choose_library(dist: Dist, gpu: str | None, target: str | None) -> str:
    """Target of the library for a phone: `target`, else the one for its GPU, else one for any.

    `gpu` is None where no phone is asked. Raises `UsageError` when the DIST holds none that fits.
    """
    names = [name for name, entry in dist.manifest.libraries.items() if device_of(name, entry.path) == "android"]
    every = ", ".join(dist.manifest.libraries) or "none"
    if not names:
        if any(device_of(name, entry.path) == "iphone" for name, entry in dist.manifest.libraries.items()):
            raise UsageError(
                f"{dist.path} is for iPhone, whose models are built into the app by Xcode",
                hint=f"awq-compile package {dist.path} -o mlc-llm/ios/MLCChat; docs/ios.md says the rest",
            )
        raise UsageError(
            f"{dist.path} has no library that MLC's Android app links, only for {every}",
            hint="awq-compile MODEL --target android (Adreno), or android:mali",
        )
    if target is not None:
        chosen = f"{target}:adreno" if target == "android" else target
        if chosen not in names:
            raise UsageError(f"{dist.path} has no library for {target}, only for {every}", hint=f"--target {names[0]}")
        return chosen
    if gpu is None:
        return names[0]
    for name in (f"android:{gpu}", "android:generic"):
        if name in names:
            return name
    wanted = f"android:{gpu}" if gpu in ("adreno", "mali") else "android:generic"
    raise UsageError(
        f"the phone's GPU is {gpu}, and {dist.path} has libraries for {', '.join(names)}",
        hint=f"awq-compile MODEL --target {wanted}, or send it all the same with --target {names[0]}",
    )


def model_folder(dist: Dist, target: str, app: str) -> str:
    """The model's folder on the phone; the app finds it by the model's id."""
    return f"{app_folder(app)}/{model_id(dist.manifest.libraries[target].path)}"


def model_files(dist: Dist) -> tuple[ModelFile, ...]:
    """What the runtime reads, without libraries and reports. The configuration is last: an app takes a model
    without one for absent, so a half-sent one is never loaded."""
    tokenizer = json_field(dist.chat_config, "tokenizer_files", list, str(dist.path / CHAT_CONFIG))
    names = [*dict.fromkeys(record.file for record in dist.tensors), *tokenizer, TENSOR_CACHE, CHAT_CONFIG]
    found = []
    for name in dict.fromkeys(names):
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise ArtifactError(f"{dist.path}: {name!r:.80} is not a plain file name, which a phone's shell can take")
        entry = dist.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"{dist.path}: {name} is not among the files of its manifest", hint="compile again")
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ArtifactError(f"{dist.path}: the sha256 of {name} is {entry.sha256!r:.80}", hint="compile again")
        found.append(ModelFile(dist.path / name, entry.nbytes, entry.sha256))
    return tuple(found)


def make_plan(files: Sequence[ModelFile], there: Mapping[str, str]) -> Plan:
    """`there` is sha256 by name of the files in the model's folder; files of other names in it are left alone."""
    names = {file.name for file in files}
    return Plan(
        send=tuple(file for file in files if there.get(file.name) != file.sha256),
        keep=tuple(file for file in files if there.get(file.name) == file.sha256),
        remove=tuple(sorted(name for name in there if name not in names and _SHARD.fullmatch(name))),
    )


def check_space(plan: Plan, storage_bytes: int, stage_bytes: int) -> None:
    """Raises unless all fits: every file in the app's folder, and the largest in the staging folder beside it."""
    for what, needed, free in (
        ("the app's storage", plan.nbytes + plan.largest if plan.send else 0, storage_bytes),
        ("the staging folder", plan.largest, stage_bytes),
    ):
        if needed > free:
            raise EnvironmentMissingError(
                f"{needed / 1e6:.1f} MB are needed in {what} of the phone, and {free / 1e6:.1f} MB are free",
                hint="delete something on the phone",
            )
