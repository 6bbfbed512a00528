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


WORK = {"problem": 1, "bucket": "gemv", "rows": 1, "arrays": [], "expected": [], "candidates": []}
BUNDLE = {"bundle": "b", "target": "t", "tvm": "1", "templates": {}, "kind": "llvm", "machine": "m"}
BUNDLE |= {"search": {"limit": 2.0}, "final": {"limit": 2.0}, "works": [WORK]}


@pytest.mark.parametrize(
    "changes",
    [
        *("", "{", "[]", "\ufeff{}", "[" * 100_000, '{"bundle": ' + "1" * 5000 + "}"),
        *({"works": 5}, {"works": [5]}, {"works": [{}]}, {"works": [WORK | {"candidates": [{"schedule": 1}]}]}),
        *({"search": {}}, {"final": {"limit": "x"}}),
    ],
)
def test_a_damaged_bundle_is_one_line_and_what_to_do(tmp_path: Path, changes: dict[str, Any] | str) -> None:
    """The file and the reason, without a traceback; a good one is read."""
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps(BUNDLE))
    assert far.read_bundle(path) == BUNDLE
    path.write_text(changes if isinstance(changes, str) else json.dumps(BUNDLE | changes))
    with pytest.raises(SystemExit, match=r"bundle\.json is damaged: .*\ncopy the whole bundle here again"):
        far.read_bundle(path)


@pytest.mark.parametrize("line", ["{", "[]", "{}", json.dumps(WORK | {"found": {"status": "ok", "cold": 5}})])
def test_damaged_results_are_one_line_and_what_to_do(tmp_path: Path, line: str) -> None:
    """A cut or foreign line, by its file."""
    path = tmp_path / "results.jsonl"
    path.write_text(f"{{}}\n{line}\n")
    with pytest.raises(SystemExit, match=r"results\.jsonl is damaged: .*\nremove it"):
        far.read_lines(path)


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
