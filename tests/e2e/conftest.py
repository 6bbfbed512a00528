"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_models import DEMO

from awq_compile import verification
from awq_compile.cli.main import main
from awq_compile.manifest import Dist, open_dist
from awq_compile.targets import resolve_target
from awq_compile.verify.execution import missing

RUNNABLE = ("opencl", "vulkan", "android:adreno")  # whose kernels a machine may have something to run with


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a test stay in its own folder."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path / "cache"))


def _verify_nothing(patch: pytest.MonkeyPatch) -> None:
    not_asked_for = verification.Verification(ran=False, reason="not asked for")
    patch.setattr(verification, "verify_library", lambda *_: not_asked_for)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds verify nothing, which takes seconds."""
    _verify_nothing(monkeypatch)


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Dist:
    """The demo model for the CPU and all that can run here; its kernels are verified singly elsewhere.

    Chunks are of 32 tokens; the checkpoint lies in `cache` beside it.
    """
    runnable = [name for name in RUNNABLE if missing(resolve_target(name)) is None]
    folder = tmp_path_factory.mktemp("whole")
    words = [str(DEMO), "-o", str(folder / "dist"), "--method", "rtn", "--scheme", "w4g128", "--target", "cpu"]
    words += [word for name in runnable for word in ("--target", name)]
    words += ["--prefill-chunk-size", "32", "--context-window-size", "160", "--max-batch-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWQ_COMPILE_CACHE", str(folder / "cache"))
        _verify_nothing(patch)
        assert main(words) == 0
    return open_dist(folder / "dist")
