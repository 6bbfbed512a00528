"""The files beside a library that are damaged are the ones that are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq_compile.errors import ArtifactError
from awq_compile.verify.sidecar import read_sidecar, source_path, table_path


def test_the_damaged_file_is_named(tmp_path: Path) -> None:
    """Launch tables that are not JSON, and a source that is not text."""
    library = tmp_path / "model.so"
    library.write_bytes(b"library")
    with pytest.raises(ArtifactError, match=r"model.so.launch.json does not exist"):
        read_sidecar(library)
    table_path(library).write_text("{}")
    source_path(library).write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"model.so.cu is not CUDA C\+\+"):
        read_sidecar(library)
    source_path(library).unlink()
    table_path(library).write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"model.so.launch.json: not UTF-8 text"):
        read_sidecar(library)
