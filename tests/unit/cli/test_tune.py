"""`awq-compile tune` with a device that runs nothing: what is found is kept, listed, explained, merged and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import Run
from helpers_tuning import FakeMeasurer

import awq_compile
from awq_compile.cli import tune
from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.targets import resolve_target
from awq_compile.tuning.measure import Work
from awq_compile.tuning.problems import Share
from awq_compile.tuning.session import tune_works
from awq_compile.tuning.tune import Options

DEMO = Path(awq_compile.__file__).parent / "data" / "demo"
FEW = ("--target", "opencl", "--bucket", "gemv", "--trials", "6")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeMeasurer:
    """Fast where a thread takes many rows."""
    fake = FakeMeasurer(lambda schedule: 1e-4 / schedule.rows)
    monkeypatch.setattr(tune, "_measurer", lambda spec, seed, place: fake)
    return fake


def test_what_is_found_is_used(run: Run, device: FakeMeasurer, private_cache: Path) -> None:
    """Every GEMV of the demo gets a record, a second run measures nothing, and --explain finds them."""
    code, out, err = run("tune", DEMO, *FEW, "--json")
    assert code == 0, err
    kernels = json.loads(out)["kernels"]
    assert len(kernels) == 5 and {kernel["bucket"] for kernel in kernels} == {"gemv"}
    assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
    assert all(kernel["speedup"] > 1 and kernel["measured"] == 6 for kernel in kernels)
    (file,) = (private_cache / "tuned").iterdir()
    assert file.name == "fake-gpu-1-opencl-generic.jsonl" and len(file.read_text().splitlines()) == 5

    measured = len(device.measured)
    code, out, _ = run("tune", DEMO, *FEW, "--json")
    assert code == 0 and len(device.measured) == measured
    assert [kernel["recalled"] for kernel in json.loads(out)["kernels"]] == [6] * 5

    code, out, err = run("tune", "--explain", DEMO, "--target", "opencl", "--json")
    sources = {(kernel["bucket"], kernel["source"]) for kernel in json.loads(out)["kernels"]}
    assert code == 0 and sources == {("gemv", "tuned"), ("small", "rule"), ("gemm", "rule")}
    assert "of a decode step" in err and "runner-up" in err and "% of the roofline" in err


def test_records_are_listed_merged_and_compared(
    run: Run, device: FakeMeasurer, private_cache: Path, tmp_path: Path
) -> None:
    """A merged file equals the original, a changed one differs in its record, and damage is named."""
    file = private_cache / "tuned" / "fake-gpu-1-opencl-generic.jsonl"
    spec, problem = resolve_target("opencl"), MatmulProblem(64, 128, QuantSpec(4, 32), dtype="float16")
    works = [Work(replace(problem, n=n), "gemv", 1) for n in (64, 96, 128, 160, 192)]
    results = tune_works(device, [Share(work, 1, 0.2) for work in works], spec, device.roof(), Options(trials=2))
    assert len(list(results)) == 5
    code, out, _ = run("tune", "--list")
    assert code == 0 and out.count("Fake GPU 1") == 5
    copy = tmp_path / "copy.jsonl"
    copy.write_text(file.read_text() + "{}\n")
    code, out, err = run("tune", "--merge", copy, copy, "--out", tmp_path / "merged.jsonl")
    assert code == 0 and "5 records, 5 of them new" in out and f"{copy}:6: skipped" in err
    assert (tmp_path / "merged.jsonl").read_text() == file.read_text()
    code, out, _ = run("tune", "--diff", file, tmp_path / "merged.jsonl")
    assert code == 0 and out == "the same records\n"
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["seconds"] *= 2
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    code, out, _ = run("tune", "--diff", copy, file, "--json")
    assert sorted(row["what"] for row in json.loads(out)["differences"]) == ["added", "changed"]
    file.unlink()
    assert run("tune", "--merge", tmp_path / "merged.jsonl")[0] == 0
    assert file.read_text() == (tmp_path / "merged.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--list", "--merge"), "exclude each other"),
        (("--diff", "a"), "two files"),
        (("--merge",), "needs files"),
        (("a", "b"), "one MODEL"),
        (("none",), "does not exist"),
        ((DEMO, "--bucket", "huge"), "unknown bucket"),
        ((DEMO, "--ray", "auto"), "are built here, not by Ray"),
        ((DEMO, "--rpc-server", "h:1", "--ray", "head"), "not the address of a Ray cluster"),
        ((DEMO, "--export-bundle", "bundle", "--ray", "head"), "not the address of a Ray cluster"),
        ((DEMO, "--target", "opencl", "--scheme", "w9g1"), "bits must be"),
    ],
)
def test_wrong_command_lines(run: Run, words: tuple[str | Path, ...], message: str) -> None:
    """Exit code 2 and one clear sentence."""
    code, _, err = run("tune", *words)
    assert code == 2 and message in err


def test_a_device_that_is_not_here(run: Run) -> None:
    """Exit code 3, and what to do instead."""
    code, _, err = run("tune", DEMO, "--target", "metal")
    assert code == 3 and "nothing on this machine runs and times kernels for metal" in err


def test_a_file_that_is_not_there(run: Run) -> None:
    """Exit code 1: the file is named."""
    code, _, err = run("tune", "--merge", "none.jsonl")
    assert code == 1 and "none.jsonl cannot be read" in err


def test_a_bundle_is_written_and_its_results_are_taken_in(run: Run, private_cache: Path, tmp_path: Path) -> None:
    """The GEMVs of the demo, each with its untuned schedule only, measured by the script, become records."""
    place = tmp_path / "bundle"
    words = ("--target", "cpu", "--bucket", "gemv", "--trials", "1")
    code, out, err = run("tune", DEMO, *words, "--export-bundle", place, "--json")
    assert code == 0 and json.loads(out)["kernels"] == 5 and json.loads(out)["candidates"] == 5, err
    results = tmp_path / "results.jsonl"
    subprocess.run([sys.executable, place / "measure.py", results], check=True, timeout=300)
    code, out, err = run("tune", "--import-results", results, "--json")
    assert code == 0 and json.loads(out) == {"target": "cpu", "records": 5, "statuses": {"ok": 5}}, err
    (file,) = (private_cache / "tuned").iterdir()
    assert len(file.read_text().splitlines()) == 5
    assert run("tune", "--import-results", tmp_path / "none")[0] == 1
    assert run("tune", "--import-results", results, "--list")[0] == 2
