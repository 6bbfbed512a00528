"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a test stay in its own folder."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path / "cache"))
