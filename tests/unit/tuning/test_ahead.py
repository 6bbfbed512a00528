"""Several children build, one at a time times, and what a candidate does is told as by one child."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from helpers_tuning import COMMAND, CRASHES, FAILS, GOOD, HANGS, WORK, WRONG, fake

from awq_compile.errors import EnvironmentMissingError
from awq_compile.targets import resolve_target
from awq_compile.tuning.ahead import AheadMeasurer
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import Plan

SPEC = resolve_target("opencl")
QUICK = Plan(limit=1.0)


def workers(*commands: list[str]) -> AheadMeasurer:
    return AheadMeasurer([LocalMeasurer(SPEC, command=command) for command in commands])


def test_nothing_is_built_while_another_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two batches is built, then timed; a comparison comes behind them, in the first child."""
    monkeypatch.setenv("FAKE_DEVICE_EVENTS", str(tmp_path / "events"))
    with workers(COMMAND, COMMAND) as measurer:
        assert measurer.capacity == 8
        found = list(measurer.measure(WORK, [fake(GOOD, rows) for rows in range(2, 26, 2)], QUICK))
        assert {m.schedule: m.status for m in found} == {fake(GOOD, rows): "ok" for rows in range(2, 26, 2)}
        assert all(m.device == measurer.fingerprint() for m in found)
        events = (tmp_path / "events").read_text().split()
        changes = [events[0], *(b for a, b in pairwise(events) if a != b)]
        assert changes == ["build", "run", "build", "run"]
        assert events.count("build") == 12 and events[:8] == ["build"] * 8
        assert [m.status for m in measurer.compare(WORK, [fake(GOOD), fake(WRONG)], QUICK)] == ["ok", "wrong"]


def test_each_fate_is_told() -> None:
    """Those that were built in a child that is lost are built again."""
    fates = (CRASHES, GOOD, FAILS, HANGS, WRONG, GOOD, GOOD, FAILS)
    schedules = [fake(fate, 2 * i + 2) for i, fate in enumerate(fates)]
    with workers(COMMAND, COMMAND) as measurer:
        found = {m.schedule: m.status for m in measurer.measure(WORK, schedules, QUICK)}
    expected = ("crashed", "ok", "failed", "hung", "wrong", "ok", "ok", "failed")
    assert [found[schedule] for schedule in schedules] == list(expected)


def test_a_device_for_one_process() -> None:
    """The second child does not start: the first does its work. Without the first, nothing is measured."""
    failing = [COMMAND[0], "-c", "raise SystemExit('the device is busy')"]
    with workers(COMMAND, failing) as measurer:
        found = list(measurer.measure(WORK, [fake(GOOD, rows) for rows in range(2, 18, 2)], QUICK))
        assert [m.status for m in found] == ["ok"] * 8 and measurer.capacity == 1
    with workers(failing, COMMAND) as measurer, pytest.raises(EnvironmentMissingError, match="exit status 1"):
        list(measurer.measure(WORK, [fake(GOOD), fake(WRONG)], QUICK))
