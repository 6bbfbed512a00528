"""The main job on the bundled model, through the command line, in processes of their own: nothing is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_models import DEMO

from awq_compile.manifest import open_dist

PROMPT = "Now is the winter of"
FEW = ("--calib-samples", "16")  # a quarter of the default: the job is the same, and tests are quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with its own cache."""
    return tmp_path_factory.mktemp("demo")


def awq_compile(folder: Path, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs one command line."""
    done = subprocess.run(
        [sys.executable, "-m", "awq_compile.cli.main", *map(str, words)],
        cwd=folder,
        env={**os.environ, "AWQ_COMPILE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, Any]:
    """What the main job reports, with perplexities on a part of the held-out text."""
    text = folder / "part.txt"
    text.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:24_000], encoding="utf-8")
    data: dict[str, Any] = json.loads(awq_compile(folder, DEMO, *FEW, "--eval", text, "--json").stdout)
    return data


def test_the_main_job(folder: Path, built: dict[str, Any]) -> None:
    """The library agrees with torch, the DIST is whole, and it is smaller than float16."""
    dist = folder / "dist" / "demo-w4g128"
    open_dist(dist).verify()
    assert built["report"]["libraries"]["cpu"]["verification"]["passed"]
    sizes = built["report"]["sizes"]
    assert sizes["parameter_bytes"] < sizes["float16_bytes"] / 2
    assert (dist / "report.html").stat().st_size > 10_000
    assert [p.name for p in dist.parent.iterdir()] == ["demo-w4g128"]


def test_perplexities(built: dict[str, Any]) -> None:
    """The compiled library's perplexity is torch's within 0.1%, and quantising costs less than 5%."""
    rows = {row["name"]: row["perplexity"] for row in built["report"]["evaluation"]["rows"]}
    assert list(rows) == ["original", "rtn", "awq", "library"]
    assert rows["library"] == pytest.approx(rows["awq"], rel=1e-3)
    assert rows["original"] * 0.99 < rows["awq"] < rows["original"] * 1.05


def test_run_generates(folder: Path, built: dict[str, Any]) -> None:
    """Greedy text streams to stdout and is the same each time; sampling depends on the seed alone."""
    words = ("run", built["dist"], "--prompt", PROMPT, "--max-tokens", "32")
    first = awq_compile(folder, *words)
    data = json.loads(awq_compile(folder, *words, "--json").stdout)
    assert first.stdout == data["text"] + "\n"
    assert len(data["tokens"]) == 32 and len(data["text"].split()) > 8
    drawn = [
        json.loads(awq_compile(folder, *words, "--json", "--temperature", "1", "--seed", seed).stdout)["tokens"]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bench_inspect_eval(folder: Path, built: dict[str, Any]) -> None:
    """The other verbs work on what the main job made."""
    speed = json.loads(awq_compile(folder, "bench", built["dist"], "--runs", "1", "--json").stdout)
    assert speed["decode"]["median"] > 0
    found = json.loads(awq_compile(folder, "inspect", built["dist"], "--verify", "--json").stdout)
    assert found["digests_checked"]
    words = ("eval", built["dist"], built["checkpoint"], "--text", folder / "part.txt", "--windows", "2", "--json")
    rows = json.loads(awq_compile(folder, *words).stdout)["rows"]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-3)
    assert "compiled already" in awq_compile(folder, built["dist"], code=2).stderr


def test_a_second_run_gives_equal_bytes(folder: Path, built: dict[str, Any]) -> None:
    """Compiled again, into another folder: every file but the report, which has no perplexities now, is the same."""
    awq_compile(folder, DEMO, *FEW, "-o", "again")
    first, again = open_dist(folder / built["dist"]), open_dist(folder / "again")
    assert first.manifest.files.keys() == again.manifest.files.keys()
    differing = [name for name, entry in first.manifest.files.items() if again.manifest.files[name] != entry]
    assert differing == ["report.html", "report.json"]
