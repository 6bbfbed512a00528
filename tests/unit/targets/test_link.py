"""A linker that fails says why, also where it ended without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq_compile import settings
from awq_compile.errors import CompileError, EnvironmentMissingError, UsageError
from awq_compile.targets import link, resolve_target
from awq_compile.targets.link import link_shared
from awq_compile.tuning.database import write_records


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
    with pytest.raises(EnvironmentMissingError, match=r"cannot link demo\.so: the disk is full, .* 2097152 bytes free"):
        link_shared("x86_64-linux-gnu", tmp_path / "demo.so", objects)


@pytest.mark.parametrize(
    "name", ["vulkan@foo", "cuda:sm_90@../../x", "opencl@/x-y", "cuda@x86_64-", "cpu:foo", "cpu:../x-y@znver4"]
)
def test_a_host_that_is_no_triple_is_refused(name: str) -> None:
    """Before its parts are looked at."""
    with pytest.raises(UsageError, match=rf"^{name}: '.*' is not an LLVM triple, as x86_64-linux-gnu is"):
        resolve_target(name)


@pytest.mark.parametrize("name", ["cpu:x86_64-linux-gnu", "cuda:sm_90"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWQ_COMPILE_LINKER", '"'), *(("AWQ_COMPILE_THREADS", value) for value in ("abc", "0", "-1", "1.5", "1" * 5000))],
)
def test_settings_that_do_not_fit_are_refused_early(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, value: str
) -> None:
    """The build's first check names the variable."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"^{variable} is '"):
        resolve_target(name).check_tools()


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that keeps something there says so, with the variable to change."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", "/proc/none")
    with pytest.raises(EnvironmentMissingError, match="the cache folder /proc/none/simt cannot be made") as caught:
        settings.cache_folder("simt")
    assert caught.value.hint == "export AWQ_COMPILE_CACHE=DIR"
    with pytest.raises(EnvironmentMissingError, match=r"/proc/none/x\.jsonl cannot be written"):
        write_records(settings.cache_dir() / "x.jsonl", [])
