"""A linker that fails says why, also where it ended without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.targets import link
from awq_compile.targets.link import link_shared


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    """One, of 3 MB."""
    (tmp_path / "a.o").write_bytes(bytes(3 << 20))
    return [tmp_path / "a.o"]


@pytest.mark.parametrize(
    ("linker", "why"),
    [
        ("false", "it ended with exit status 1"),
        ("sh -c 'kill -9 $$'", "it was ended by SIGKILL"),
        ("sh -c 'echo undefined symbol >&2; exit 1'", "undefined symbol"),
    ],
)
def test_the_reason_is_never_empty(
    tmp_path: Path, objects: list[Path], monkeypatch: pytest.MonkeyPatch, linker: str, why: str
) -> None:
    """What the linker said, else how it ended."""
    monkeypatch.setenv("AWQ_COMPILE_LINKER", linker)
    with pytest.raises(CompileError, match=rf"linking demo\.so failed: {why}") as error:
        link_shared("x86_64-linux-gnu", tmp_path / "demo.so", objects)
    assert error.value.hint == "check AWQ_COMPILE_LINKER"


def test_a_linker_without_space(tmp_path: Path, objects: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may die of a signal, and remove what it wrote: less space than the objects take is the reason."""
    usage = link.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(link.shutil, "disk_usage", lambda _path: usage._replace(free=2 << 20))
    monkeypatch.setenv("AWQ_COMPILE_LINKER", "sh -c 'kill -7 $$'")
    with pytest.raises(EnvironmentMissingError, match=rf"{tmp_path}/demo\.so: the disk is full, .* 2097152 bytes free"):
        link_shared("x86_64-linux-gnu", tmp_path / "demo.so", objects)
