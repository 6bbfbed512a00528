"""The main job on the bundled model, through the command line, in processes of their own: nothing is replaced."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
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


def awq_compile(folder: Path, *words: str | Path, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs one command line."""
    done = subprocess.run(
        [sys.executable, "-m", "awq_compile.cli.main", *map(str, words)],
        cwd=folder,
        env={**os.environ, "AWQ_COMPILE_CACHE": str(folder / "cache")},
        capture_output=True,
        input=stdin,
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


def test_chat(folder: Path, built: dict[str, Any]) -> None:
    """Turns follow each other, the second on what the cache holds; a piped message is one turn."""
    words = ("chat", built["dist"], "--max-tokens", "16", "--temperature", "0")
    data = json.loads(awq_compile(folder, *words, "-m", PROMPT, "-m", "Romeo.", "--json").stdout)
    first, second = data["answers"]
    assert (first["reused_tokens"], first["finish"]) == (0, "max_tokens")
    assert second["reused_tokens"] > first["prompt_tokens"]
    assert [m["content"] for m in data["messages"]] == [PROMPT, first["text"], "Romeo.", second["text"]]
    assert awq_compile(folder, *words, stdin=PROMPT + "\n").stdout == first["text"] + "\n"


def test_chat_at_a_terminal(folder: Path, built: dict[str, Any]) -> None:
    """Ctrl-C ends an answer, and the next turn works; a second one while nothing is said ends the program."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "awq_compile.cli.main", "chat", built["dist"], "--temperature", "10"]
    child = subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_terminal
    )
    os.close(theirs)
    seen = ""

    def until(*words: str, again: bytes = b"") -> None:
        """Reads until all words have come; what is to be typed `again` is typed every second."""
        nonlocal seen
        end = time.monotonic() + 120
        while not all(word in seen for word in words):
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
            elif again:
                os.write(ours, again)

    def type_(text: str) -> None:
        nonlocal seen
        seen = ""
        os.write(ours, text.encode())

    until("Ctrl-D ends", "> ")
    type_(PROMPT + "\n")
    until(PROMPT)
    while not seen.partition(PROMPT)[
        2
    ].strip():  # an answer, which at this temperature goes on to the end of the window
        seen += os.read(ours, 4096).decode(errors="replace")
    type_("\x03")
    until("(ended)", "> ")
    type_("/reset\n")
    until("begins anew", "> ")
    type_("\x03")
    # Python's readline misses a Ctrl-C that comes between its prompt and its waiting for input.
    until("interrupted", again=b"\x03")
    assert child.wait(timeout=60) == 130
    os.close(ours)


def _terminal() -> None:
    """Makes stdin the controlling terminal, so that Ctrl-C reaches the process as it does a person's.

    A shell's background jobs, and so tests among them, ignore it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


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
