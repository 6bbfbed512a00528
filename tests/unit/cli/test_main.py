"""The command line itself: what is a verb, what a word costs, and which exit code an error gives."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import Run
from typer import Typer

from awq_compile.cli import build
from awq_compile.cli import main as main_module
from awq_compile.cli import run as run_module
from awq_compile.cli.main import PLANNED, VERBS
from awq_compile.errors import (
    ArtifactError,
    AwqCompileError,
    CalibrationError,
    CheckpointError,
    CompileError,
    EnvironmentMissingError,
    ModelError,
    UsageError,
)

HEAVY = ("torch", "tvm", "transformers", "numpy")


def test_help_imports_nothing_heavy() -> None:
    """--help, and every verb's --help, load neither torch, tvm, transformers nor NumPy."""
    for words in ([], *([verb] for verb in VERBS)):
        code = f"import sys; from awq_compile.cli.main import main; assert main({[*words, '--help']!r}) == 0; "
        code += f"assert not {set(HEAVY)!r} & set(sys.modules), set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_names_the_verbs_and_no_planned_one(run: Run) -> None:
    """The main help lists every verb, and none that this version lacks."""
    code, out, _ = run("--help")
    assert code == 0
    assert [verb for verb in VERBS if verb not in out] == []
    verbs = out.partition("Verbs")[2]
    assert [verb for verb in PLANNED if verb in verbs or f"--{verb}" in out] == []
    assert "onnx" not in out.lower()


@pytest.mark.parametrize("verb", PLANNED)
def test_planned_verbs_are_refused(run: Run, verb: str) -> None:
    """Verbs of later versions are usage errors, not models of that name."""
    code, out, err = run(verb, "x")
    assert (code, out) == (2, "")
    assert f"{verb} is not available in this version" in err


def test_a_first_word_that_is_a_verb_is_a_verb(run: Run, tmp_path: Path) -> None:
    """A folder called `run` is reached as ./run only."""
    Path("run").mkdir()
    code, _, err = run("run")
    assert code == 2 and "Missing argument" in err
    code, _, err = run("./run")
    assert code == 1 and "config.json does not exist" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-option"], "No such option"),
        (["--bits", "four"], "Invalid value for '--bits'"),
        (["a", "b"], "unexpected extra argument"),
        (["run"], "Missing argument"),
        (["run", "x", "--top-p", "2", "--prompt", "x"], "Invalid value for '--top-p'"),
        (["bench", "--runs", "0", "x"], "Invalid value for '--runs'"),
        (["eval"], "Missing argument"),
        *(
            ([*words, "--seed", seed], "Invalid value for '--seed'")
            for words in (["x"], ["quantize", "x", "-o", "q"], ["eval", "x"], ["run", "x"], ["chat", "x"], ["tune"])
            for seed in ("-1", str(1 << 32))
        ),
    ],
)
def test_usage_errors(run: Run, words: list[str], message: str) -> None:
    """What the parser refuses ends with 2, one line, and no traceback."""
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err
    verb = [word for word in words[:1] if word in VERBS]
    assert err.endswith(" ".join(["  hint: awq-compile", *verb, "--help\n"]))
    assert "Traceback" not in err


ERRORS: list[tuple[BaseException, int, str]] = [
    (AwqCompileError("plain"), 1, "error: plain"),
    (UsageError("x", hint="type y"), 2, "hint: type y"),
    (EnvironmentMissingError("x"), 3, "error: x"),
    (ModelError("x"), 1, "error: x"),
    (CalibrationError("x"), 1, "error: x"),
    (CheckpointError("x"), 1, "error: x"),
    (ArtifactError("x"), 1, "error: x"),
    (CompileError("x"), 1, "error: x"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "/disk/file"), 3, "cannot write /disk/file: the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "/disk/file"), 3, "permission denied"),
    (ModuleNotFoundError("No module named 'tvm'", name="tvm"), 3, "the Python package 'tvm' is missing"),
    (MemoryError(), 3, "out of memory"),
    (RuntimeError("surprise"), 1, "RuntimeError: surprise"),
]


@pytest.mark.parametrize(("error", "code", "words"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, run: Run, error: BaseException, code: int, words: str) -> None:
    """Every kind of error gives its documented exit code and one message; -v adds the traceback."""

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(main_module, "dispatch", fail)
    found, out, err = run("model")
    assert (found, out) == (code, "")
    assert words in err and "Traceback" not in err
    if not isinstance(error, KeyboardInterrupt):
        assert "Traceback" in run("model", "-v")[2]


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    """SIGINT while the main job runs ends with 130 and one line."""
    code = "import sys, time\nfrom awq_compile.cli import main, build, source\n"
    code += "source.find_model = lambda *a: (print('ready', flush=True), time.sleep(60))\n"
    code += "sys.exit(main.main(['x']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.startswith("error: interrupted") and "Traceback" not in err


def test_a_closed_pipe_is_no_crash() -> None:
    """`awq-compile --help | head -1` ends quietly."""
    command = f"{sys.executable} -m awq_compile.cli.main --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_version(run: Run) -> None:
    """--version prints the version alone."""
    import awq_compile

    assert run("--version")[:2] == (0, f"awq-compile {awq_compile.__version__}\n")


def test_every_verb_takes_json_and_verbose() -> None:
    """--json and -v are options of the main job and of every verb."""
    job, verbs = main_module._apps()
    assert isinstance(job, Typer)
    for command in (*job.registered_commands, *verbs.registered_commands):
        assert command.callback is not None
        assert {"as_json", "verbose"} <= set(command.callback.__annotations__), command.name
    assert {command.name for command in verbs.registered_commands} == set(VERBS)
    assert build.build is job.registered_commands[0].callback


def test_prompt_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt comes from --prompt, a file or stdin; none, two or an empty one are usage errors."""
    file = tmp_path / "prompt.txt"
    file.write_text("from a file")
    assert run_module.prompt_text("given", None) == "given"
    assert run_module.prompt_text(None, file) == "from a file"
    for prompt, path in ((None, tmp_path / "none"), ("a", file), ("", None)):
        with pytest.raises(UsageError):
            run_module.prompt_text(prompt, path)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="cannot be read"):
        run_module.prompt_text(None, file)


def test_a_prompt_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no characters, of the command line and of a stream of either kind, are usage errors."""
    with pytest.raises(UsageError, match="the prompt is not Unicode text"):
        run_module.prompt_text("\udcff", None)
    for errors, message in (("surrogateescape", "not Unicode text"), ("strict", "stdin is not UTF-8 text")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8", errors=errors))
        with pytest.raises(UsageError, match=message):
            run_module.prompt_text(None, Path("-"))
