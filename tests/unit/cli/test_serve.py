"""Handing over to MLC: what is checked first, and the command line it gets; against stand-ins for its packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import Run
from helpers_models import write_model

import awq_compile
from awq_compile.manifest import open_dist

pytestmark = pytest.mark.usefixtures("no_compiler")

ENGINE = "class MLCEngine: pass\n"
MAIN = "import json, os, sys\nprint(json.dumps({'argv': sys.argv[1:], 'cwd': os.getcwd()}))\nsys.exit(7)\n"
TVM = """
class _Library(dict):
    pass

class runtime:
    @staticmethod
    def load_module(path):
        if open(path, "rb").read() != b"library": raise RuntimeError("undefined symbol: TVMFFIHandleInitOnce")
        return _Library(vm_load_executable=None)
"""


@pytest.fixture
def dist(run: Run, tmp_path: Path) -> Path:
    """A DIST with a library of a few bytes."""
    code, _, err = run(write_model(tmp_path / "tiny"), "--method", "rtn", "-o", tmp_path / "dist")
    assert code == 0, err
    return tmp_path / "dist"


def stand_in(folder: Path, *, init: str | None = ENGINE, version: str = "0.27.1") -> Path:
    """Packages mlc_llm and tvm that do as the real ones do when they are asked what is asked here."""
    (folder / "tvm").mkdir(parents=True)
    (folder / "tvm" / "__init__.py").write_text(f"__version__ = {version!r}\n{TVM}")
    if init is not None:
        (folder / "mlc_llm").mkdir()
        (folder / "mlc_llm" / "__init__.py").write_text(init)
        (folder / "mlc_llm" / "__main__.py").write_text(MAIN)
    return folder


def awq_compile_with(packages: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, in whose Python the stand-ins are."""
    path = os.pathsep.join([str(packages), str(Path(awq_compile.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-m", "awq_compile.cli.main", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_serve(dist: Path, tmp_path: Path) -> None:
    """MLC's server takes over: its arguments, its output and its exit code."""
    packages = stand_in(tmp_path / "packages")
    Path("mlc_llm.py").write_text("raise SystemExit('the working directory was run')")
    done = awq_compile_with(packages, "serve", dist, "--host", "0.0.0.0", "--port", "8123", "--mode", "server")
    assert done.returncode == 7, done.stderr
    library = next((dist / "lib").glob("*.so"))
    assert json.loads(done.stdout)["argv"] == [
        *("serve", str(dist), "--model-lib", str(library), "--device", "cpu"),
        *("--mode", "server", "--host", "0.0.0.0", "--port", "8123"),
    ]
    assert "was made by TVM" not in done.stderr


def test_chat(dist: Path, tmp_path: Path) -> None:
    """--engine mlc hands the chat over; a TVM of another version that loads the library is told of."""
    packages = stand_in(tmp_path / "packages", version="0.26.0")
    done = awq_compile_with(packages, "chat", dist, "--engine", "mlc")
    assert done.returncode == 7, done.stderr
    library = next((dist / "lib").glob("*.so"))
    assert json.loads(done.stdout)["argv"] == [
        *("chat", str(dist), "--model-lib", str(library), "--device", "cpu"),
    ]
    assert "the library was made by TVM 0.27" in done.stderr and "0.26.0" in done.stderr
    done = awq_compile_with(packages, "chat", dist, "--engine", "mlc", "-m", "hello")
    assert done.returncode == 2 and "--engine mlc takes --target only" in done.stderr


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (None, "the package mlc_llm is not installed in "),
        ("", "cannot be used: it has no MLCEngine"),
        ("import no_such_module", "cannot be used: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os._exit(5)", "cannot be used: importing it ended with 5"),
    ],
)
def test_without_a_usable_package(dist: Path, tmp_path: Path, init: str | None, message: str) -> None:
    """Exit code 3, what is wrong, and the line that installs it."""
    packages = stand_in(tmp_path / "packages", init=init)
    done = awq_compile_with(packages, "serve", dist)
    assert (done.returncode, done.stdout) == (3, "")
    assert message in done.stderr
    assert "hint: python3 -m venv mlc && mlc/bin/pip install" in done.stderr


def test_a_library_that_mlc_cannot_load(dist: Path, tmp_path: Path) -> None:
    """Both versions and the loader's own words."""
    packages = stand_in(tmp_path / "packages", version="0.21.0")
    (packages / "tvm" / "__init__.py").write_text("__version__ = '0.21.0'\n" + TVM.replace('b"library"', 'b"other"'))
    done = awq_compile_with(packages, "serve", dist)
    assert done.returncode == 3
    assert "MLC's TVM 0.21.0 does not load it: RuntimeError: undefined symbol: TVMFFIHandleInitOnce" in done.stderr


def test_another_python(dist: Path, tmp_path: Path) -> None:
    """AWQ_COMPILE_MLC_PYTHON names the one that has the package."""
    packages = stand_in(tmp_path / "packages")
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexport PYTHONPATH={packages}\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    (tmp_path / "none").mkdir()
    assert awq_compile_with(tmp_path / "none", "serve", dist, AWQ_COMPILE_MLC_PYTHON=str(other)).returncode == 7
    done = awq_compile_with(tmp_path / "none", "serve", dist, AWQ_COMPILE_MLC_PYTHON="/no/python")
    assert done.returncode == 3 and "/no/python cannot be run" in done.stderr


def test_libraries_that_are_not_for_here(run: Run, dist: Path) -> None:
    """A changed library, one for an app, and a target that DIST does not have."""

    def changed(**entry: Any) -> str:
        path = dist / "manifest.json"
        data = json.loads(path.read_text())
        data["libraries"]["cpu"] |= entry
        path.write_text(json.dumps(data))
        code, _, err = run("serve", dist)
        assert code == 1
        return err

    assert "has no library for target 'vulkan'" in run("serve", dist, "--target", "vulkan")[2]
    library = dist / open_dist(dist).manifest.libraries["cpu"].path
    library.write_bytes(b"libRary")
    assert "sha256 is" in changed()
    assert "is for an app and cannot be loaded here" in changed(tvm_target={"kind": "webgpu"})
