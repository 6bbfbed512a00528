"""Puts this folder on the import path, so that tests can import `helpers_*`; `--fail-on-skip` for CI.

Tests skip by what they find on the machine. CI has all of it, so there a skip says that something broke.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest

# What scripts/test cannot give to every machine: reason of the skip → why that is so.
EXPECTED_SKIPS: Final = {
    r"nvcc is not on PATH": "the CUDA toolkit is not in Debian, and takes gigabytes",
    r".+ has subgroups of \d+$": "a software driver has those of the processor's vectors",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers the option."""
    parser.addoption("--fail-on-skip", action="store_true", help="fail when a test skips that CI expects to run")


class UnexpectedSkips:
    """Collects them, of tests and of whole modules, and fails the session."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def _see(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.match(pattern, reason) for pattern in EXPECTED_SKIPS):
            self.found.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test."""
        self._see(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Of a module."""
        self._see(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """An otherwise good run fails."""
        if self.found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says which."""
        if self.found:
            terminalreporter.section("skips that CI does not expect", red=True, bold=True)
            for line in self.found:
                terminalreporter.write_line(line)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checkpoints and tuned schedules that lie on this machine change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWQ_COMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Watches where the option is given."""
    if config.getoption("--fail-on-skip"):
        config.pluginmanager.register(UnexpectedSkips(), "unexpected-skips")
