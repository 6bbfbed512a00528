"""A bundle measured where there is nothing but TVM's runtime gives the records of measuring directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_tuning import FAILS, WORK, FakeBuilds

from awq_compile.errors import CompileError, UsageError
from awq_compile.targets import resolve_target
from awq_compile.tuning.bundle import candidates_of, read_results, write_bundle
from awq_compile.tuning.database import ScheduleDatabase
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import Plan
from awq_compile.tuning.templates import encode_schedule
from awq_compile.tuning.tune import make_record

SPEC = resolve_target("cpu")
THE_WORK = replace(WORK, problem=replace(WORK.problem, dtype=SPEC.dtype))
PLAN = Plan(warmups=1, most=3, cold_seconds=1e-5, warm_seconds=0, limit=60)
HIDDEN = ("awq_compile", "torch", "tvm")  # tvm is found for its library, and cannot be imported


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(a bundle, what its script wrote in an environment without our package and TVM's), one candidate damaged."""
    folder = tmp_path_factory.mktemp("far")
    count = write_bundle(folder / "bundle", [THE_WORK], SPEC, ScheduleDatabase(), trials=4, search=PLAN, final=PLAN)
    assert count == 4
    with pytest.raises(UsageError, match="exists"):
        write_bundle(folder / "bundle", [THE_WORK], SPEC, ScheduleDatabase(), trials=4)
    (folder / "bundle" / "w0" / "3.so").write_bytes(b"not a library")

    import tvm

    stubs = folder / "stubs"
    for name in HIDDEN:
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text(f"raise RuntimeError('{name} is imported')\n")
    library = str(Path(tvm.__file__).parent / "lib")
    environment = {**os.environ, "PYTHONPATH": str(stubs), "TVM_LIBRARY_PATH": library}
    command = [sys.executable, str(folder / "bundle" / "measure.py"), str(folder / "results.jsonl")]
    for _ in range(2):  # the second finds everything done
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder / "results.jsonl", [json.loads(s) for s in (folder / "results.jsonl").read_text().splitlines()]


def test_a_bundle_gives_what_measuring_directly_gives(bundle: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same key, device and statuses; the damaged candidate has failed and is not chosen."""
    path, lines = bundle
    results = read_results(path)
    schedules = candidates_of(THE_WORK, SPEC, ScheduleDatabase(), 4)
    with LocalMeasurer(SPEC) as measurer:
        direct = measurer.compare(THE_WORK, schedules[:3], PLAN)
        record = make_record(THE_WORK, SPEC, measurer.roof(), direct[0], direct[1:], 4)
    (found,) = results.records
    assert (found.key, found.device, found.trials) == (record.key, record.device, record.trials)
    assert found.schedule in schedules[:3] and results.statuses == {"ok": 3, "failed": 1}
    assert [line["found"]["status"] for line in lines[1:5]] == [*(m.status for m in direct), "failed"]
    assert [line["found"]["schedule"] for line in lines[1:5]] == [encode_schedule(s) for s in schedules]
    assert len(lines) == 6 and "final" in lines[5] and results.notes == []


def test_a_bundle_that_is_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates are begun at once; libraries and errors are those from there."""
    (tmp_path / "built").mkdir()
    builds, works = FakeBuilds(tmp_path / "built"), [THE_WORK, replace(THE_WORK, bucket="small", rows=4)]
    (rule,) = candidates_of(THE_WORK, SPEC, ScheduleDatabase(), 1)
    schedules = [replace(rule, prefetch=p) for p in (0, FAILS)]
    monkeypatch.setattr("awq_compile.tuning.bundle.candidates_of", lambda *_: schedules)
    assert write_bundle(tmp_path / "bundle", works, SPEC, ScheduleDatabase(), trials=2, builds=builds) == 4
    assert builds.begun == [(work, schedule) for work in works for schedule in schedules]
    described = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["works"]
    for i, work in enumerate(described):
        good, bad = work["candidates"]
        assert good == {"schedule": encode_schedule(schedules[0]), "file": f"w{i}/0.so"}
        assert bad == {"schedule": encode_schedule(schedules[1]), "error": "does not compile there"}
        assert (tmp_path / "bundle" / good["file"]).read_bytes() == b"no library"


def first(line: str, **changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Changes the measurement `line` of the third line."""

    def change(lines: list[dict[str, Any]]) -> None:
        lines[2][line] |= changes

    return change


DAMAGE: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no header": (lambda lines: lines.pop(0), "1: no results of a bundle"),
    "another TVM": (lambda lines: lines[0].update(tvm="0.1"), "1: measured with TVM 0.1"),
    "no target": (lambda lines: lines[0].update(target="abacus"), "1: .*abacus"),
    "status": (first("found", status="splendid"), "3: .*splendid"),
    "time": (first("found", cold={"median": -1, "low": 1, "high": 1, "count": 1}), "3: a measurement holds the times"),
    "long time": (first("found", cold={"median": 10**400, "low": 1, "high": 1, "count": 1}), "3: .*401 digits"),
    "count": (first("found", cold={"median": 1, "low": 1, "high": 1, "count": "x"}), "3: a measurement holds"),
    "no times": (first("found", cold=7), "3: not a measurement"),
    "schedule": (first("found", schedule={"template": "simd_gemv", "lanes": 16, "rows": 65536}), "3: "),
    "problem": (first("problem", n=10**9), "3: n is"),
    "rows": (lambda lines: lines[2].update(rows=4), "3: .*4 rows are not in the bucket gemv"),
    "list": (lambda lines: lines.insert(2, []), "3: a JSON object is expected"),  # type: ignore[arg-type]
    "rule": (lambda lines: lines[5].update(final=lines[5]["final"][1:]), "6: .*not the untuned schedule"),
    "surrogate": (first("found", error="\ud800"), "3: .*found.error holds half of a surrogate pair"),
    "device": (lambda lines: [m["device"].update(name=["x"]) for m in lines[5]["final"]], "6: name is"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_results_are_read_as_from_a_stranger(
    bundle: tuple[Path, list[dict[str, Any]]], tmp_path: Path, damage: str
) -> None:
    """Whatever does not fit is one error with file and line."""
    lines = json.loads(json.dumps(bundle[1]))
    change, message = DAMAGE[damage]
    change(lines)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CompileError, match=f"results.jsonl:{message}"):
        read_results(path)


def test_a_kernel_that_nothing_computes_right_is_named(
    bundle: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """It gives no record, and does not keep others from theirs."""
    lines = json.loads(json.dumps(bundle[1]))
    lines[5]["final"] = [{**found, "status": "wrong"} for found in lines[5]["final"]]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(path)
    assert not results.records and "nothing gives the right result" in results.notes[0]


def test_half_of_the_results(bundle: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """A work that was not measured to the end gives no record, and is named."""
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in bundle[1][:3]))
    results = read_results(path)
    assert not results.records and THE_WORK.name in results.notes[0] and results.statuses == {"ok": 2}
