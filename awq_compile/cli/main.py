"""`awq-compile`: a first word that is a verb is a verb, anything else is the main job.

Exceptions become exit codes here and nowhere else: 0 done, 1 failed, 2 usage, 3 environment,
130 interrupted. No module imported here imports torch, tvm or transformers.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from typing import Any, Final

import typer

from awq_compile import __version__
from awq_compile.cli import (
    bench,
    build,
    chat,
    check_contract,
    deploy,
    doctor,
    evaluate,
    inspect,
    package,
    quantize,
    run,
    serve,
    sweep,
    targets,
    tune,
    verify,
)
from awq_compile.errors import AwqCompileError, ExitCode, UsageError

# Words of the design that this version does not have; a folder of that name is ./export.
PLANNED: Final = ("export",)

_CONTEXT: Final = {"help_option_names": ["-h", "--help"]}
_EPILOG: Final = (
    "Verbs, each with its own --help: "
    "quantize (AWQ only), run (generate text), chat, serve (by MLC's engine), bench (tokens per second), "
    "eval (perplexity and KL divergence), verify (every kernel against the reference), "
    "check-contract (what the MLC runtime demands), inspect (what a directory holds), "
    "tune (measured schedules for a device, here or elsewhere), sweep (tune models on a farm), "
    "package (models into an app), deploy (a model onto an Android phone), "
    "targets, doctor (what works on this machine). "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 environment, 130 interrupted."
)


def _apps() -> tuple[typer.Typer, typer.Typer]:
    """The main job, and the verbs."""
    shared: dict[str, Any] = {"add_completion": False, "rich_markup_mode": "rich", "context_settings": _CONTEXT}
    job = typer.Typer(**shared)
    job.command(epilog=_EPILOG)(build.build)
    verbs = typer.Typer(**shared, no_args_is_help=True)
    verbs.command("quantize")(quantize.quantize)
    verbs.command("run")(run.run)
    verbs.command("chat")(chat.chat)
    verbs.command("serve")(serve.serve)
    verbs.command("bench")(bench.bench)
    verbs.command("eval")(evaluate.evaluate)
    verbs.command("verify")(verify.verify)
    verbs.command("check-contract")(check_contract.check_contract)
    verbs.command("inspect")(inspect.inspect)
    verbs.command("tune")(tune.tune)
    verbs.command("sweep")(sweep.sweep)
    verbs.command("package")(package.package)
    verbs.command("deploy")(deploy.deploy)
    verbs.command("targets")(targets.targets)
    verbs.command("doctor")(doctor.doctor)
    return job, verbs


VERBS: Final = (
    *("quantize", "run", "chat", "serve", "bench", "eval", "verify", "check-contract", "inspect"),
    *("tune", "sweep", "package", "deploy", "targets", "doctor"),
)


def dispatch(argv: list[str]) -> int:
    """Runs one command line and returns its exit code; errors propagate."""
    if argv[:1] == ["--version"]:
        print(f"awq-compile {__version__}")
        return ExitCode.DONE
    if argv and argv[0] in PLANNED:
        raise UsageError(
            f"{argv[0]} is not available in this version",
            hint=f"write ./{argv[0]} for a model in a folder of that name",
        )
    job, verbs = _apps()
    app = verbs if argv and argv[0] in VERBS else job
    code = typer.main.get_command(app).main(argv, prog_name="awq-compile", standalone_mode=False)
    return code if isinstance(code, int) else ExitCode.DONE


def _usage_message(error: BaseException) -> str:
    """Text of a command-line error, with the nearest option where there is one."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    return message


def _show(message: str, hint: str | None) -> None:
    """One clear error on stderr."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, dim, plain = ("\033[1;31m", "\033[2m", "\033[0m") if colour else ("", "", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    if hint:
        print(f"{dim}  hint:{plain} {hint}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Entry point: never raises."""
    words = sys.argv[1:] if argv is None else argv
    verbose = "-v" in words or "--verbose" in words
    click_error = typer.BadParameter.__mro__[2]  # typer vendors click from 0.16 on: no import works for all versions
    try:
        code = int(dispatch(words))
        if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, typer.Abort):
        resumes = words[:1] not in (["run"], ["chat"], ["serve"])
        kept = "; what was finished is kept, and the same command goes on from there" if resumes else ""
        _show(f"interrupted{kept}", None)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except typer.Exit as leave:
        return leave.exit_code
    except AwqCompileError as error:
        if verbose:
            traceback.print_exc()
        _show(str(error), error.hint)
        return error.exit_code
    except Exception as error:
        if isinstance(error, click_error):
            _show(_usage_message(error), " ".join(["awq-compile", *(w for w in words[:1] if w in VERBS), "--help"]))
            return ExitCode.USAGE
        if (clear := _environment(error)) is not None:
            if verbose:
                traceback.print_exc()
            _show(str(clear), clear.hint)
            return clear.exit_code
        if verbose:
            traceback.print_exc()
        _show(f"{type(error).__name__}: {error}", None if verbose else "this is a bug; -v shows where")
        return ExitCode.FAILED


def _environment(error: Exception) -> AwqCompileError | None:
    """The clear error behind a failure of the disk, the memory or a missing package, if it is one."""
    from awq_compile.artifact import disk_error
    from awq_compile.errors import EnvironmentMissingError

    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("awq_compile"):
        return EnvironmentMissingError(
            f"the Python package {error.name!r} is missing", hint="pip install -c constraints.txt -e ."
        )
    if isinstance(error, MemoryError):
        return EnvironmentMissingError("out of memory", hint="close other programs, or use a smaller model")
    return disk_error(error)


def nearest(word: str, known: list[str]) -> str:
    """A hint with the words nearest to a mistyped one."""
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


if __name__ == "__main__":
    sys.exit(main())
