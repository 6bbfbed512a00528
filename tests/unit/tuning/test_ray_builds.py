"""Builds on a Ray cluster, with a stand-in for Ray: what comes back, and what is said of a cluster that ails."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_tuning import WORK

from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.schedules import GemvSchedule
from awq_compile.targets import resolve_target
from awq_compile.tuning import ray_builds, ray_driver
from awq_compile.tuning.export import export_kernel, library_name
from awq_compile.tuning.foreign import Trace
from awq_compile.tuning.measure import Measurement
from awq_compile.tuning.ray_builds import RayBuilds, check_address
from awq_compile.tuning.rpc import Place

FAKE = Path(__file__).parents[2] / "fake_ray"
SPEC = resolve_target("cpu")
THE_WORK = replace(WORK, problem=replace(WORK.problem, dtype=SPEC.dtype))
LANES = SPEC.rule(THE_WORK.problem).of("gemv").lanes  # type: ignore[union-attr]
GOOD, CRASHES, HANGS, GONE, LACKS = (GemvSchedule(LANES, rows=rows) for rows in (2, 4, 6, 8, 12))
BAD = Trace("no JSON")
AILING = {
    name: f'"rows": {schedule.rows},'
    for name, schedule in (("crashes", CRASHES), ("hangs", HANGS), ("gone", GONE), ("lacks", LACKS))
}


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is the stand-in, here and in drivers."""
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_RAY_AILING", json.dumps(AILING))


@pytest.fixture
def builds() -> Iterator[RayBuilds]:
    """A cluster that was started here."""
    with RayBuilds("local", SPEC) as started:
        yield started


def test_a_cluster_builds_what_is_built_here(builds: RayBuilds, tmp_path: Path) -> None:
    """The same library, the same words about a candidate that does not build, and one that crashes or hangs says so."""
    builds.begin([(THE_WORK, schedule) for schedule in (BAD, GOOD, CRASHES)], 60)
    export_kernel(THE_WORK, GOOD, SPEC, tmp_path / "here.so")
    with pytest.raises(ValueError) as error:
        export_kernel(THE_WORK, BAD, SPEC, tmp_path / "never.so")
    built = builds.library(THE_WORK, GOOD)
    assert built == builds.folder / library_name(THE_WORK, GOOD, ".so")
    assert built.read_bytes() == (tmp_path / "here.so").read_bytes()
    assert builds.library(THE_WORK, BAD) == Measurement(BAD, "failed", error=f"{error.type.__name__}: {error.value}")
    crashed = builds.library(THE_WORK, CRASHES)
    assert crashed == Measurement(CRASHES, "crashed", error="WorkerCrashedError: unexpectedly")
    builds.begin([(THE_WORK, HANGS)], 0.1)
    assert not list(builds.folder.iterdir())
    hung = builds.library(THE_WORK, HANGS)
    assert isinstance(hung, Measurement) and hung.status == "hung"
    builds.begin([(THE_WORK, LACKS)], 60)
    with pytest.raises(EnvironmentMissingError, match=r"at local: .*No module named 'awq_compile'") as lacks:
        builds.library(THE_WORK, LACKS)
    assert "every node needs the same" in str(lacks.value.hint)
    builds.begin([(THE_WORK, GONE)], 60)
    for _ in range(2):
        with pytest.raises(EnvironmentMissingError, match="the Ray cluster at local is gone"):
            builds.library(THE_WORK, GONE)
    builds.begin([(THE_WORK, GOOD)], 60)
    with pytest.raises(EnvironmentMissingError, match="the Ray cluster at local is gone"):
        builds.library(THE_WORK, GOOD)


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ("awq-compile", r"has awq-compile \d\S*, and the machine that asks has awq-compile 9.9$", "pip install"),
        ("apache-tvm", r"has apache-tvm 0\S*, and the machine that asks has apache-tvm 9.9$", "pip install"),
        ("the template simd_gemv", r"the template simd_gemv 1, .* the template simd_gemv 9.9$", "pip install"),
        ("the template new", "the template new unknown, .* the template new 9.9$", "pip install"),
        ("cpu as", 'cpu as {.*"kind": "llvm".* cpu as 9.9$', "cpu:TRIPLE@CPU"),
    ],
)
def test_a_node_refuses_to_build_otherwise(changed: str, message: str, hint: str) -> None:
    """It names what differs, as it is there and here."""
    job = json.loads(ray_driver.encode_job("cpu", THE_WORK, GOOD))
    job["like"][changed] = "9.9"
    answer = json.loads(ray_driver.build(json.dumps(job)))
    assert re.search(message, answer["refused"]) and hint in answer["hint"]


def test_a_node_that_refuses_is_found_before_a_candidate_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that was begun and has no result would not be begun again."""
    here = ray_driver.origin(SPEC.name) | {"awq-compile": "9.9"}
    monkeypatch.setattr(ray_driver, "origin", lambda target: here)
    with pytest.raises(EnvironmentMissingError, match=r"at local: the Ray worker on .* has awq-compile 9.9$"):
        RayBuilds("local", SPEC)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "127.0.0.1:1 does not answer within 3 s"),
        ("127.0.0.1:2", "ConnectionError: Could not find any running Ray instance."),
        ("127.0.0.1:3", "127.0.0.1:3 is gone: Failed to connect to GCS"),
    ],
)
def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, address: str, message: str) -> None:
    """Whether Ray hangs, raises or ends its driver, it is one error, and soon."""
    monkeypatch.setattr(ray_builds, "_ANSWER_SECONDS", 3.0)
    start = time.monotonic()
    with pytest.raises(EnvironmentMissingError, match=message):
        RayBuilds(address, SPEC)
    assert time.monotonic() - start < 30


def test_without_ray_and_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, and what was typed that does not fit."""
    monkeypatch.setattr(ray_builds, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentMissingError, match="'ray' is missing") as missing:
        RayBuilds("local", SPEC)
    assert missing.value.hint == "pip install awq-compile[ray]"
    for good in ("auto", "local", "head:6379", "ray://head:10001"):
        assert check_address(good) == good
        assert Place.parse("h:1", None, "k", good).ray == good
    for wrong in ("here", "head", "head:0", "http://head:1", "ray://auto"):
        with pytest.raises(UsageError, match="not the address of a Ray cluster"):
            Place.parse(None, "h:1", None, wrong)
    with pytest.raises(UsageError, match="are built here, not by Ray"):
        Place.parse(None, None, None, "auto")
