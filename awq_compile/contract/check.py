"""The whole contract of a DIST: its directory, each of its libraries, and what they must share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from awq_compile.contract.directory import (
    CHAT_CONFIG,
    TENSOR_CACHE,
    check_config,
    check_parameters,
    check_tensors,
    is_inside,
    read_object,
)
from awq_compile.contract.finding import Finding
from awq_compile.contract.library import check_library, read_library
from awq_compile.deploy.package import DEVICES, PACKAGE_CONFIG
from awq_compile.errors import ArtifactError, CompileError
from awq_compile.limits import CompileOptions
from awq_compile.manifest import MANIFEST, file_sha256, open_dist, read_manifest

# Of the apps that a DIST has a library for; a second one lies in a folder.
PACKAGE_CONFIGS: Final = (PACKAGE_CONFIG, *(f"{device}/{PACKAGE_CONFIG}" for device in DEVICES))
_KINDS: Final = ("llvm", "cuda", "vulkan", "metal", "opencl")
_AGAIN: Final = "compile again, or copy the whole directory"


def check_contract(folder: Path, *, digests: bool = True) -> list[Finding]:
    """Every way in which a DIST breaks MLC's contract; nothing of it is loaded or run.

    Without `digests` the contents of files are not read again to compare them with the manifest's sha256.

    Raises `ArtifactError` for what is no DIST at all.
    """
    try:
        libraries = _libraries(read_object(folder / MANIFEST))
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder / MANIFEST}: expected a compiled model's, found {error}", hint="awq-compile MODEL writes one"
        ) from None
    findings: list[Finding] = []
    if not libraries:
        findings.append(Finding("missing-library", f"{MANIFEST}: libraries", "one or more", "none", _AGAIN))
    config = _object(folder, CHAT_CONFIG, findings)
    if config:
        findings += check_config(config, folder)
    cache = _object(folder, TENSOR_CACHE, findings)
    tensors, wrong = check_tensors(cache, folder) if cache else ({}, [])
    findings += wrong
    prefixes: dict[str, str] = {}
    for name, device in libraries.items():
        if not is_inside(folder, name):
            findings.append(Finding("missing-library", name, "a file in the directory", "none", _AGAIN))
            continue
        try:
            library = read_library(folder / name, device)
            findings += check_library(library, config)
        except ArtifactError as error:
            findings.append(
                Finding("unreadable-library", name, "a library of TVM's virtual machine", str(error), _AGAIN)
            )
            continue
        if cache:
            findings += check_parameters(library.name, library.metadata, tensors, config)
        if library.archive and library.prefix in prefixes:
            other = prefixes[library.prefix]
            what = f"another prefix than {library.prefix!r} of {other}"
            findings.append(Finding("prefix", library.name, what, "the same", "compile one of them under another name"))
        prefixes[library.prefix] = library.name
    for name in PACKAGE_CONFIGS:
        if (folder / name).exists():
            findings += _package(_object(folder, name, findings), folder, name, prefixes)
    findings += list(_damage(folder, findings, digests))
    if not any(finding.severity == "error" for finding in findings):
        try:
            open_dist(folder)
        except ArtifactError as error:
            findings.append(Finding("directory", MANIFEST, "a directory that awq-compile opens", str(error), _AGAIN))
    return findings


def require_contract(folder: Path) -> None:
    """Raises `CompileError` for a DIST that breaks the contract, with every error in its message."""
    found = check_contract(folder, digests=False)  # the manifest was written of these files just now
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        lines = "\n".join(f"  {finding}" for finding in errors[:20])
        more = f"\n  and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise CompileError(
            f"MLC's runtime would not take what was compiled:\n{lines}{more}",
            hint="this is a bug in awq-compile: --dump DIR shows what each pass did",
        )


def _damage(folder: Path, findings: Sequence[Finding], digests: bool) -> Iterator[Finding]:
    """Files that are not those of the manifest, without those that errors among `findings` name already."""
    named = {PurePosixPath(f.where.partition(":")[0]).name for f in findings if f.severity == "error"}
    try:
        manifest = read_manifest(folder / MANIFEST)
        CompileOptions.read(manifest.options)
    except ArtifactError as error:
        yield Finding("manifest", MANIFEST, "what awq-compile wrote", str(error), _AGAIN)
        return
    for name, entry in manifest.files.items():
        if not is_inside(folder, name):
            if PurePosixPath(name).name not in named:
                yield Finding("missing-file", f"{MANIFEST}: files", "files in the directory", f"{name!r:.80}", _AGAIN)
            continue
        expected, found = f"{entry.nbytes} bytes", f"{(folder / name).stat().st_size} bytes"
        if digests and found == expected:
            expected, found = f"sha256 {entry.sha256}", f"sha256 {file_sha256(folder / name)}"
        if found != expected and PurePosixPath(name).name not in named:
            yield Finding("damaged-file", name, f"{expected}, as in {MANIFEST}", found, _AGAIN)


def _package(data: Mapping[str, Any], folder: Path, name: str, prefixes: Mapping[str, str]) -> Iterator[Finding]:
    """An app finds each library by its `model_lib`, which is its prefix without the last underscore."""
    given = data.get("model_lib_path_for_prepare_libs")
    listed = data.get("model_list")
    named = (
        {entry.get("model_lib") for entry in listed if isinstance(entry, dict)} if isinstance(listed, list) else set()
    )
    if not isinstance(given, dict) or not named <= set(given):
        what = "an object with the path of every model_lib of model_list"
        yield Finding("package", f"{name}: model_lib_path_for_prepare_libs", what, f"{given!r:.80}", _AGAIN)
    for lib, path in given.items() if isinstance(given, dict) else ():
        prefix = f"{lib.replace('-', '_')}_"
        if prefixes.get(prefix) != str(path).rpartition("/")[2]:
            what = f"the archive with the prefix {prefix!r}"
            yield Finding("package", f"{name}: {lib:.80}", what, f"{path!r:.80}", _AGAIN)


def _libraries(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Path → kind of device."""
    listed, found = manifest.get("libraries"), {}
    if not isinstance(listed, dict):
        raise ArtifactError("no libraries")
    for name, entry in listed.items():
        target = entry.get("tvm_target") if isinstance(entry, dict) else None
        kind = target.get("kind") if isinstance(target, dict) else None
        if kind not in _KINDS or not isinstance(entry.get("path"), str):
            raise ArtifactError(f"the library {name!r:.80} with the path or the target {entry!r:.80}")
        found[entry["path"]] = kind
    return found


def _object(folder: Path, name: str, findings: list[Finding]) -> dict[str, Any]:
    try:
        return read_object(folder / name)
    except ArtifactError as error:
        findings.append(Finding("missing-file", name, "a JSON object", str(error), _AGAIN))
        return {}
