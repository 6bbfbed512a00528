"""`awq-compile sweep` with a device that runs nothing: cells, going on, the report, and files that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import Run
from helpers_tuning import FakeMeasurer

import awq_compile
from awq_compile.cli import sweep, tune
from awq_compile.errors import CompileError, UsageError
from awq_compile.tuning.sweep import Cell, SweepDevice, read_sweep, run_sweep
from awq_compile.tuning.sweep_report import sweep_html

DEMO = Path(awq_compile.__file__).parent / "data" / "demo"
SWEEP = f"""
models = ["{DEMO}"]
schemes = ["w4g128", "w4g32"]
buckets = ["gemv"]
trials = 2

[[device]]
target = "opencl"

[[device]]
name = "phones"
target = "android"
tracker = "127.0.0.1:1"
key = "8gen3"
"""


def test_a_sweep_goes_on_and_reports(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cells that are done are not run again, one whose tracker is away fails by itself, and the report has both."""
    fake, places = FakeMeasurer(lambda schedule: 1e-4 / schedule.rows), []

    def measurer(spec: object, seed: int, place: object) -> object:
        places.append(str(place))
        return fake if str(place) == "here" else place.open(spec, seed)  # type: ignore[attr-defined]

    monkeypatch.setattr(tune, "_measurer", measurer)
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(SWEEP)
    code, text, err = run("sweep", file, "--out", out, "--json")
    cells = json.loads(text)["cells"]
    assert code == 1 and "2 of 4 cells failed" in err
    assert [len(cell["kernels"]) for cell in cells] == [5, 5, 0, 0] and places == ["here"] * 2 + [
        "8gen3 at 127.0.0.1:1"
    ] * 2
    assert all("no RPC tracker answers at 127.0.0.1:1" in cell["error"] for cell in cells[2:])
    report = (out / "report.html").read_text()
    assert report.count("<svg") == 2 and "no RPC tracker answers" in report and str(DEMO) in report
    with (out / "sweep.jsonl").open("a") as state:
        state.write('{"cell": "what a kill leaves')
    measured, places[:] = len(fake.measured), []
    assert run("sweep", file, "--out", out)[0] == 1
    assert len(fake.measured) == measured and len(places) == 2
    assert (out / "report.html").read_text() == report


KERNEL = {"kernel": "a", "bucket": "gemv", "share": 1, "seconds": 1e-5, "untuned_seconds": 2e-5}
KERNEL |= {"roofline_seconds": 1e-6}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cell": 5}, "line 1 is no finished cell"),
        ({"devices": {"here": "x"}}, "line 1 is no finished cell"),
        ({"kernels": [5]}, "line 1 is no finished cell"),
        *(
            ({"kernels": [KERNEL | {key: value}]}, "line 1 is no finished cell")
            for key, value in (
                *(("share", None), ("share", 0), ("roofline_seconds", "x"), ("seconds", 0), ("untuned_seconds", 1e300)),
                *(("kernel", "a\n"), ("bucket", 7)),
            )
        ),
        ({"kernels": [KERNEL | {"seconds": float("nan")}]}, r"kernels\[0\]\.seconds is NaN"),
        ({"kernels": [KERNEL | {"seconds": 10**400}]}, "seconds is an integer of 401 digits"),
        ({"kernels": [KERNEL | {"kernel": "\ud800"}]}, "kernel holds half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting"),
    ],
)
def test_a_state_that_does_not_fit(tmp_path: Path, changes: dict[str, Any] | str, reason: str) -> None:
    """One error with the file and the reason, before any cell is tuned; a line that fits is taken."""
    cell = Cell("a", None, SweepDevice("cpu", "cpu"), ("gemv",), 1, 1, 0, None)
    good: dict[str, Any] = {"cell": cell.key(), "kernels": [KERNEL], "devices": {}}
    tune = pytest.fail
    (tmp_path / "sweep.jsonl").write_text(json.dumps(good) + "\n")
    ((result, earlier),) = run_sweep([cell], tmp_path, tune)
    assert earlier and sweep_html([result])
    (tmp_path / "sweep.jsonl").write_text((changes if isinstance(changes, str) else json.dumps(good | changes)) + "\n")
    with pytest.raises(CompileError, match=f"sweep.jsonl is damaged: .*{reason}"):
        list(run_sweep([cell], tmp_path, tune))


def test_an_untuned_schedule_that_is_wrong_has_no_time(tmp_path: Path) -> None:
    """The sweep goes on from its own file, without an infinite speed-up."""
    cell = Cell("a", None, SweepDevice("cpu", "cpu"), ("gemv",), 1, 1, 0, None)
    kernels = [KERNEL | {"untuned_seconds": math.inf, "speedup": math.inf}]
    for _ in range(2):
        ((result, _),) = run_sweep([cell], tmp_path, lambda _cell: (kernels, {}))
        assert result.speedup == 1.0


def test_a_failed_cell_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hint of what ended it stands beside its error."""

    def damaged(*_: object) -> None:
        raise CompileError("x.trials is damaged", hint="remove x.trials")

    monkeypatch.setattr(sweep, "_tune_cell", damaged)
    file = tmp_path / "sweep.toml"
    file.write_text(SWEEP)
    code, _, err = run("sweep", file, "--out", tmp_path / "out")
    assert code == 1 and "x.trials is damaged (remove x.trials)" in err
    assert "hint: mend what each says above, then start the sweep again" in err


def test_help_shows_brackets(run: Run) -> None:
    """Which are no markup in the name of a table."""
    assert "[[device]]" in run("sweep", "--help")[1]


def test_a_sweep_is_the_product_of_its_lists(tmp_path: Path) -> None:
    """Every model with every scheme on every device; without schemes the target's own."""
    path = tmp_path / "sweep.toml"
    path.write_text('models = ["a", "b"]\nseconds = 9\n[[device]]\ntarget = "cpu"\n')
    device = SweepDevice("cpu", "cpu")
    buckets = ("gemv", "pair", "quad", "small", "medium", "broad", "large", "wide", "gemm")
    assert read_sweep(path) == [Cell(model, None, device, buckets, 64, 24, 0, 9) for model in ("a", "b")]


def test_a_cluster_builds_for_the_devices_elsewhere(tmp_path: Path) -> None:
    """The one here needs none, and a cell that was done with another cluster is done."""
    path = tmp_path / "sweep.toml"
    table = '[[device]]\ntarget = "cpu"\n[[device]]\ntarget = "android"\nserver = "h:1"\n'
    path.write_text(f'models = ["a"]\nray = "head:6379"\n{table}')
    cells = read_sweep(path)
    assert [cell.place.ray for cell in cells] == ["", "head:6379"]
    path.write_text(f'models = ["a"]\n{table}')
    assert [cell.key() for cell in read_sweep(path)] == [cell.key() for cell in cells]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("", "models is missing"),
        ("models = [1]", "models is"),
        ('models = ["a"]\nmodel = 1', "unknown keys model"),
        ('models = ["a"]', "no device is given"),
        ('models = ["a"]\ntrials = 0', "trials is 0"),
        ('models = ["a"]\ntrials = true', "trials is True"),
        ('models = ["a"]\nseconds = nan', "seconds is nan"),
        ('models = ["a"]\nray = true', "ray is True"),
        ('models = ["a"]\nray = "head"', "'head' is not the address of a Ray cluster"),
        ('models = ["a"]\nschemes = ["w5"]', "w5"),
        ('models = ["a"]\nbuckets = ["x"]', "buckets: unknown x"),
        ('models = ["a"]\n[[device]]\nname = "x"', "target is missing"),
        ('models = ["a"]\n[[device]]\ntarget = "abacus"', "abacus"),
        ('models = ["a"]\n[[device]]\ntarget = "cpu"\nport = 1', "device: unknown keys port"),
        ('models = ["a"]\n[[device]]\ntarget = "cpu"\ntracker = "h:1"', "which devices"),
        ('models = ["a"]\n[[device]]\ntarget = "cpu"\n[[device]]\ntarget = "cpu"', "the same name"),
        ("models = ", "not TOML"),
        (f'models = ["a"]\nseed = {"1" * 5000}', "not TOML"),
    ],
)
def test_a_key_that_does_not_fit_is_named(tmp_path: Path, changes: str, message: str) -> None:
    """One error with the file and the key."""
    path = tmp_path / "sweep.toml"
    path.write_text(changes)
    with pytest.raises(UsageError, match=f"sweep.toml.*{message}"):
        read_sweep(path)
