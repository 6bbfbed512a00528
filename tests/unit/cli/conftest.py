"""Fixtures for command-line tests: a private cache, and stand-ins for the compiler and the verification."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers_cli import Run

from awq_compile.cli.main import main


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of a test stay in its own folder, and the working directory is an empty one."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "cache"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process → (exit code, stdout, stderr)."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that writes a fixed library at once, and checks of it that pass."""
    from awq_compile import compiler, verification
    from awq_compile.contract import check

    def compile_library(
        config: object, scheme: object, target: object, options: object, out: Path, **_: object
    ) -> object:
        out.write_bytes(b"library")
        kernels = [{"kernel": "qmatmul", "rows": "gemv", "schedule": "lanes=8", "source": "rule"}]
        return compiler.CompileReport("cpu", [], kernels, {"decode": 1024}, 0.5, 7)

    monkeypatch.setattr(compiler, "compile_library", compile_library)
    monkeypatch.setattr(check, "require_contract", lambda dist: None)
    good = verification.Verification(ran=True, tokens=48, max_difference=1e-6)
    monkeypatch.setattr(verification, "verify_library", lambda dist, model, target: dataclasses.replace(good))
