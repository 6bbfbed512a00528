"""A bundle's script: one child for many candidates, another after each that fails, and an end when time is up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq_compile.tuning import far

# Stands for the script's own child: what becomes of a candidate is written in its schedule.
CHILD = """
import json, os, sys, time
works = json.load(open("bundle.json"))["works"]
for line in sys.stdin:
    at, which, plan = json.loads(line)
    found = []
    for i in which:
        schedule = works[at]["candidates"][i]["schedule"]
        if schedule["fate"] == "crashed":
            os.abort()
        time.sleep(60 if schedule["fate"] == "hung" else schedule.get("seconds", 0))
        times = {"median": schedule.get("time", 1.0), "pid": os.getpid()}
        found.append({"schedule": schedule, "status": schedule["fate"], "cold": times})
    print(json.dumps({"found": found}), flush=True)
"""


def bundle_in(folder: Path, monkeypatch: pytest.MonkeyPatch, works: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A bundle of works with such schedules, beside the child's script."""
    described = [
        {"problem": at, "bucket": "gemv", "rows": 1, "candidates": [{"schedule": s} for s in schedules]}
        for at, schedules in enumerate(works)
    ]
    head = {"bundle": "b", "target": "t", "tvm": "1", "templates": {}}
    bundle = head | {"search": {"limit": 2.0}, "final": {"limit": 2.0}, "works": described}
    (folder / "bundle.json").write_text(json.dumps(bundle))
    (folder / "measure.py").write_text(CHILD)
    monkeypatch.setattr(far, "HERE", folder)
    return bundle


def measured(results: Path) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """(what was found, the final measurements)."""
    lines = [json.loads(line) for line in results.read_text().splitlines()][1:]
    return [line["found"] for line in lines if "found" in line], [line["final"] for line in lines if "final" in line]


def test_only_a_candidate_that_fails_costs_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashes and hangs are recorded and never among the finalists, and the next candidate gets a new child."""
    fates = ("ok", "ok", "crashed", "ok", "hung", "wrong", "ok")
    schedules = [{"fate": fate, "time": 9.0 - i} for i, fate in enumerate(fates)]
    bundle = bundle_in(tmp_path, monkeypatch, [schedules])
    far.measure_all(bundle, tmp_path / "results.jsonl", 60.0)
    found, (final,) = measured(tmp_path / "results.jsonl")
    assert [each["status"] for each in found] == list(fates)
    assert "signal 6" in found[2]["error"] and "2 s" in found[4]["error"]
    children = [each["cold"]["pid"] for each in found if "cold" in each]
    assert children[0] == children[1] and len(set(children)) == 4
    assert [each["schedule"] for each in final] == [schedules[i] for i in (0, 6, 3, 1)]


def test_when_time_is_up_the_kernel_in_hand_is_brought_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its untuned schedule is always measured, no other work begins, and the next run goes on with that."""
    slow = {"fate": "ok", "seconds": 0.1}
    bundle = bundle_in(tmp_path, monkeypatch, [[slow, slow], [slow, slow]])
    results = tmp_path / "results.jsonl"
    far.measure_all(bundle, results, 0.05)
    found, final = measured(results)
    assert (len(found), [len(each) for each in final]) == (1, [1])
    far.measure_all(bundle, results, 60.0)
    found, final = measured(results)
    assert (len(found), [len(each) for each in final]) == (3, [1, 2])
