"""The files beside a library that `verify` needs: launch tables and, for CUDA, the source of the machine code.

    lib/demo-w4g128-opencl.so
    lib/demo-w4g128-opencl.so.launch.json      {"format", "version", "library", "source", "tables"}
    lib/demo-w4g128-cuda-sm_80.so.cu           CUDA C++, only for CUDA
    lib/config.json                            of the model, from which all libraries were compiled

`library` and `source` are digests, which bind the three together; the tables are read like a stranger's input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from awq_compile.errors import ArtifactError
from awq_compile.json_input import read_object
from awq_compile.manifest import file_sha256
from awq_compile.targets.cuda_launch import with_waits
from awq_compile.targets.cuda_source import with_digest
from awq_compile.verify.launch_table import Table

CONFIG_FOLDER: Final = "lib"  # of a DIST
FORMAT: Final = "awq-compile launch tables"
VERSION: Final = 1
_MAX_BYTES: Final = 256 << 20
_MAX_DEPTH: Final = 200


@dataclass(frozen=True)
class Sidecar:
    """`tables` by PrimFunc. `source` is CUDA C++, empty where the library carries its code as source itself."""

    tables: Mapping[str, Table]
    source: str = ""


def table_path(library: Path) -> Path:
    """Of the launch tables."""
    return library.with_name(library.name + ".launch.json")


def source_path(library: Path) -> Path:
    """Of the CUDA C++."""
    return library.with_name(library.name + ".cu")


def write_sidecar(library: Path, tables: Mapping[str, Table], module: Any) -> None:
    """Writes the files for a library that was exported from the runtime module `module`."""
    source = cuda_source(module)
    if source:
        source = with_digest(source)
        source_path(library).write_text(source, encoding="utf-8", newline="\n")
    data = {
        "format": FORMAT,
        "version": VERSION,
        "library": file_sha256(library),
        "source": _digest(source) if source else None,
        "tables": {name: tables[name] for name in sorted(tables)},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n"
    table_path(library).write_text(text, encoding="utf-8", newline="\n")


def cuda_source(module: Any) -> str:
    """CUDA C++ of the CUDA module among the imports of a runtime module; empty where there is none."""
    if str(module.kind) == "cuda":
        return with_waits(str(module.inspect_source("cuda")))
    return next((text for imported in module.imports if (text := cuda_source(imported))), "")


def read_sidecar(library: Path) -> Sidecar:
    """Reads the files beside a library. Raises `ArtifactError` where they are absent, damaged or another library's."""
    path = table_path(library)
    data = read_object(path, ArtifactError, _MAX_BYTES, hint="verifying needs it: compile again with this version")
    source = _source(source_path(library))
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ArtifactError(f"{path} is not a file of {FORMAT} in version {VERSION}")
    for what, found in (("library", file_sha256(library)), ("source", _digest(source) if source else None)):
        if data.get(what) != found:
            raise ArtifactError(f"{path} belongs to the {what} {data.get(what)!r:.80}, and {found} is beside it")
    tables = data.get("tables")
    if not isinstance(tables, dict):
        raise ArtifactError(f"{path}: tables is {type(tables).__name__}, expected an object")
    for name, table in tables.items():
        check_table(name, table, str(path))
    return Sidecar(tables, source)


def _source(path: Path) -> str:
    """CUDA C++; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not CUDA C++: {error}", hint="the file is damaged: compile again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def check_table(name: str, table: Any, where: str) -> None:
    """Raises `ArtifactError` unless `table` has the form that `launch_table` describes."""
    try:
        assert isinstance(table, dict) and table["name"] == name, "its name"
        for param in table["params"]:
            assert isinstance(param, dict) and {str} == {type(param["name"]), type(param["dtype"])}, "a parameter"
            for key in ("shape", "strides"):
                for expression in param.get(key, []):
                    _expression(expression)
            _expression(param.get("elem_offset", 0))
        _body(table["body"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: the launch table of {name!r:.80} is malformed: {error!r:.200}") from None


def _body(body: Any, depth: int = 0) -> None:
    assert isinstance(body, list) and depth < _MAX_DEPTH, "a block"
    for statement in body:
        kind, *rest = statement
        if kind == "let":
            _name(rest[0])
            _expression(rest[1])
        elif kind == "alloc":
            _name(rest[0])
            _name(rest[1])
            for expression in rest[2]:
                _expression(expression)
        elif kind == "if":
            _expression(rest[0])
            _body(rest[1], depth + 1)
            _body(rest[2], depth + 1)
        elif kind == "for":
            _name(rest[0])
            _expression(rest[1])
            _expression(rest[2])
            _body(rest[3], depth + 1)
        elif kind == "launch":
            _launch(rest[0])
        else:
            raise ValueError(f"unknown statement {kind!r}")


def _launch(launch: Any) -> None:
    _name(launch["kernel"])
    for buffer in launch["buffers"]:
        _name(buffer)
    assert len(launch["grid"]) == len(launch["block"]) == 3, "a grid and a block have three sizes"
    for expression in (*launch["scalars"], *launch["grid"], *launch["block"], launch.get("dynamic_shared", 0)):
        _expression(expression)


def _name(value: Any) -> None:
    assert isinstance(value, str) and 0 < len(value) < 1000, "a name"


def _expression(value: Any, depth: int = 0) -> None:
    if isinstance(value, bool | int | float):
        return
    assert isinstance(value, list) and value and depth < _MAX_DEPTH, "an expression"
    _name(value[0])
    named = value[0] in ("var", "cast")
    if named:
        _name(value[1])
    for operand in value[2:] if named else value[1:]:
        _expression(operand, depth + 1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
