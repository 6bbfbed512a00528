"""One small DIST with a library for this CPU and one for Android, which tests copy before they damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_contract import TINY, write_dist
from helpers_models import write_model


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole; not to be changed."""
    folder = tmp_path_factory.mktemp("contract")
    return write_dist(folder / "dist", write_model(folder / "model", **TINY), ["cpu", "android"])


@pytest.fixture
def dist(built: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(built, tmp_path / "dist"))
