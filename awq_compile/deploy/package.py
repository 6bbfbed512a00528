"""MLC's two files about an app's models: `mlc-package-config.json` is read by `mlc_llm package`, which builds
the app's libraries, and `mlc-app-config.json` is what it writes into the app.

An entry is a model directory, its static library under a name of its own (`model_lib`), and the memory that it needs.
Sources: `python/mlc_llm/interface/package.py` and the apps' `AppViewModel.kt` and `AppConfig.swift`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from awq_compile.compiler import model_lib
from awq_compile.errors import UsageError
from awq_compile.manifest import Dist, LibraryEntry, dump_json, json_field, json_object

PACKAGE_CONFIG: Final = "mlc-package-config.json"
APP_CONFIG: Final = "mlc-app-config.json"
DEVICES: Final = ("android", "iphone")

_OVERRIDES: Final = ("context_window_size", "prefill_chunk_size", "sliding_window_size")


@dataclass(frozen=True)
class AppModel:
    """One model of an app. `model` and `library` are paths from the folder of the package configuration."""

    model_id: str
    model_lib: str
    model: str
    library: str
    estimated_vram_bytes: int
    overrides: dict[str, int]


def device_of(target: str, library: str) -> str | None:
    """`android` or `iphone` for an archive of objects that an app links, else None."""
    if not library.endswith(".tar"):
        return None
    return {"android": "android", "metal": "iphone"}.get(target.partition(":")[0])


def model_id(library: str) -> str:
    """The app's name of a model, also of its folder on the phone: the library's file name, in ASCII."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", PurePosixPath(library).stem).strip("-._") or "model"


def package_files(
    libraries: Mapping[str, LibraryEntry],
    chat: Mapping[str, Any],
    parameter_bytes: int,
    memory_usage: Mapping[str, Mapping[str, int]],
) -> dict[str, str]:
    """Name → text of the files of a DIST with libraries for apps: of the first kind of device at its top, of
    another in a folder of that name. `memory_usage` is bytes by target and function."""
    found: dict[str, str] = {}
    for device in DEVICES:
        folder = f"{device}/" if found else ""
        root = ".." if found else "."
        models = [
            AppModel(
                model_id(entry.path),
                model_lib(Path(entry.path)),
                root,
                str(PurePosixPath(root) / entry.path),
                estimated_vram_bytes(chat, parameter_bytes, memory_usage[target]),
                {key: chat[key] for key in _OVERRIDES if chat.get(key, -1) > 0},
            )
            for target, entry in libraries.items()
            if device_of(target, entry.path) == device
        ]
        if models:
            found[folder + PACKAGE_CONFIG] = dump_json(package_config(device, models))
            found[folder + APP_CONFIG] = dump_json(app_config(device, models))
    return found


def estimated_vram_bytes(chat: Mapping[str, Any], parameter_bytes: int, memory_usage: Mapping[str, int]) -> int:
    """Memory of one chat that fills the context window, as MLC's engine estimates it when it starts.

    `EstimateMemoryUsageOnMode` of cpp/serve/config.cc in the mode `interactive`, with a KV cache in float16.
    """
    model = chat["model_config"]
    vocab, heads, kv_heads = model["vocab_size"], model["num_attention_heads"], model["num_key_value_heads"]
    layers, width, chunk = model["num_hidden_layers"], model["head_dim"], chat["prefill_chunk_size"]
    window = chat.get("sliding_window_size", -1)
    tokens = window + chunk if window > 0 else chat["context_window_size"]
    temporary = 2 * max(memory_usage.values(), default=0)  # two steps may be on their way
    cache = tokens * (4 * width * kv_heads * layers + 1.25)  # K and V
    attention = 2 * 88 + 8 * chunk * (heads + 1) + 4 * chunk * width * (heads + kv_heads) + (48 << 20)
    inputs = 4 * chunk + 4 + 2 * (2 * chunk + 1) * heads * width
    logits = 20 + 16.125 * vocab
    return int(parameter_bytes + temporary + cache + attention + inputs + logits)


def package_config(device: str, models: Sequence[AppModel]) -> dict[str, Any]:
    """mlc-package-config.json: with a path for every library, `mlc_llm package` compiles none itself."""
    return {
        "device": device,
        "model_list": [
            {
                "model": one.model,
                "model_id": one.model_id,
                "model_lib": one.model_lib,
                "bundle_weight": True,  # MLC insists for a local directory
                "estimated_vram_bytes": one.estimated_vram_bytes,
                "overrides": one.overrides,
            }
            for one in models
        ],
        "model_lib_path_for_prepare_libs": {one.model_lib: one.library for one in models},
    }


def app_config(device: str, models: Sequence[AppModel]) -> dict[str, Any]:
    """mlc-app-config.json. An iPhone's weights are in the app; Android's app asks for them at `model_url` only
    where the model's folder on the phone lacks them."""
    return {
        "model_list": [
            {
                "model_id": one.model_id,
                "model_lib": one.model_lib,
                **({"model_path": one.model_id} if device == "iphone" else {"model_url": one.model}),
                "estimated_vram_bytes": one.estimated_vram_bytes,
            }
            for one in models
        ]
    }


def app_models(dist: Dist, device: str) -> list[AppModel]:
    """The entries for a device, read back from a DIST; none where it has no library for it."""
    libraries = [e.path for t, e in dist.manifest.libraries.items() if device_of(t, e.path) == device]
    if not libraries:
        return []
    name = next((n for n in (f"{device}/{PACKAGE_CONFIG}", PACKAGE_CONFIG) if n in dist.manifest.files), None)
    if name is None:
        raise UsageError(
            f"{dist.path} has no {PACKAGE_CONFIG}", hint="it was compiled by an older version: compile again"
        )
    where = str(dist.path / name)
    entries = {}
    for entry in json_field(json_object(dist.path / name), "model_list", list, where):
        entries[json_field(entry, "model_lib", str, where)] = entry
    found = []
    for library in libraries:
        lib = model_lib(Path(library))
        entry = entries.get(lib, {})
        sizes = json_field(entry, "overrides", dict, f"{where}: {lib}")
        found.append(
            AppModel(
                model_id(library),
                lib,
                ".",
                library,
                json_field(entry, "estimated_vram_bytes", int, f"{where}: {lib}"),
                {key: json_field(sizes, key, int, f"{where}: {lib}") for key in _OVERRIDES if key in sizes},
            )
        )
    return found


def merge(dists: Iterable[Dist], device: str | None, folder: Path) -> dict[str, Any]:
    """One package configuration for several DISTs, with paths relative to `folder`, where it will lie.

    Raises `UsageError` when they serve no or several kinds of device and none is named, and when two libraries
    would have the same symbols.
    """
    every = list(dists)
    served = [name for name in DEVICES if all(app_models(dist, name) for dist in every)]
    if device is None and len(served) > 1:
        raise UsageError("every directory has libraries for both Android and iPhone", hint="--device android or iphone")
    if device is None and not served:
        lacking = next((d for d in every if not any(app_models(d, name) for name in DEVICES)), every[0])
        raise UsageError(
            f"no device is served by every directory; {lacking.path} has libraries for "
            f"{', '.join(lacking.manifest.libraries) or 'none'}",
            hint="awq-compile MODEL --target android, or --target metal:ios",
        )
    chosen = device or served[0]
    models: list[AppModel] = []
    owner: dict[str, Path] = {}
    for dist in every:
        if not (entries := app_models(dist, chosen)):
            target = "android" if chosen == "android" else "metal:ios"
            raise UsageError(f"{dist.path} has no library for {chosen}", hint=f"awq-compile MODEL --target {target}")
        path = PurePosixPath(Path(os.path.relpath(dist.path.resolve(), folder.resolve())).as_posix())
        for entry in entries:
            for key in (entry.model_lib, entry.model_id):
                if key in owner:
                    raise UsageError(
                        f"{owner[key]} and {dist.path} both have the library {entry.model_lib!r}, and an app "
                        "cannot hold two of one name",
                        hint="rename one model's folder and compile it again: the library is named after it",
                    )
            owner |= {entry.model_lib: dist.path, entry.model_id: dist.path}
            models.append(replace(entry, model=str(path), library=str(path / entry.library)))
    return package_config(chosen, models)
