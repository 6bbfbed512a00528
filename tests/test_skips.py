"""`--fail-on-skip`: CI notices a test that stopped running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = {
    "a test": 'import pytest\n\ndef test_it():\n    pytest.skip("no device")\n',
    "a module": 'import pytest\n\npytest.importorskip("no_such_package")\n\ndef test_it():\n    pass\n',
    "an expected one": 'import pytest\n\ndef test_it():\n    pytest.skip("nvcc is not on PATH")\n',
}


@pytest.mark.parametrize(("kind", "code"), [("a test", 1), ("a module", 1), ("an expected one", 0)])
def test_an_unexpected_skip_fails_the_run(kind: str, code: int, tmp_path: Path) -> None:
    """With the option only, and naming the test and its reason."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS[kind])
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *options, "."]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("--fail-on-skip")
    assert done.returncode == code, done.stdout
    assert ("skips that CI does not expect" in done.stdout) == bool(code)
    if kind == "a test":
        assert run().returncode == 0
