"""`awq-compile doctor`: what this machine can build, run and verify, and what to type to get the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes
from awq_compile.errors import ExitCode

_TVM, _TVM_FFI = "0.27.0.post1", ("0.1.14.post0", "0.1.15")
_INSTALL = "pip install -c constraints.txt -e ."


@dataclass(frozen=True)
class Finding:
    """One line: `needed` ones decide the exit code."""

    what: str
    good: bool
    found: str
    fix: str = ""
    needed: bool = True


def doctor(as_json: o.Json = False, verbose: o.Verbose = False) -> None:
    """Say what this machine can build, run and verify, and what to type for the rest."""
    output = Output(as_json, verbose)
    findings = [
        _python(),
        _packages("quantise", ("torch", "transformers", "tokenizers", "safetensors", "numpy")),
        _tvm(),
        _linker(),
        _runs_here(),
        *_gpu_targets(),
        _cache(),
        _memory(),
        _optional("fetch models from the hub", "huggingface_hub"),
        _optional("calibrate on a dataset by name", "datasets"),
        _adb(),
    ]
    for finding in findings:
        mark = "ok     " if finding.good else "MISSING" if finding.needed else "absent "
        output.say(f"{mark} {finding.what}: {finding.found}")
        if finding.fix and not finding.good:
            output.say(f"        type: {finding.fix}")
    output.result({"findings": [asdict(finding) for finding in findings]})
    if not all(finding.good for finding in findings if finding.needed):
        raise typer.Exit(ExitCode.ENVIRONMENT)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("Python", good, platform.python_version(), "install Python 3.11 or newer")


def _packages(what: str, names: tuple[str, ...]) -> Finding:
    versions = {name: _version(name) for name in names}
    found = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    return Finding(what, None not in versions.values(), found, _INSTALL)


def _tvm() -> Finding:
    """TVM loads, is the version this program is written for, and has LLVM."""
    tvm, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    what, found = "compile for cpu", f"apache-tvm {tvm or 'absent'}, apache-tvm-ffi {ffi or 'absent'}"
    if tvm != _TVM or ffi is None or not ffi.startswith("0.1.14."):
        return Finding(
            what, False, f"{found}; needed are {_TVM} and {_TVM_FFI[0]} up to, not including, {_TVM_FFI[1]}", _INSTALL
        )
    code = "import tvm; assert tvm.get_global_func('target.build.llvm', allow_missing=True) is not None"
    if (problem := _run([sys.executable, "-c", code])) is not None:
        return Finding(what, False, f"{found}, which does not load or has no LLVM: {problem}", _INSTALL)
    return Finding(what, True, f"{found}, with LLVM (any CPU triple)")


def _linker() -> Finding:
    what, version = "link libraries", _version("ziglang")
    if version is None:
        return Finding(what, False, "ziglang is absent", _INSTALL)
    problem = _run([sys.executable, "-m", "ziglang", "version"])
    return Finding(what, problem is None, f"ziglang {version}" + (f": {problem}" if problem else ""), _INSTALL)


def _run(command: list[str]) -> str | None:
    """None when the command succeeds, else the last line of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _runs_here() -> Finding:
    machine, system = platform.machine().lower(), platform.system()
    good = machine in ("x86_64", "amd64", "aarch64", "arm64")
    from awq_compile import settings

    threads = settings.num_threads()
    return Finding(
        "run and verify cpu libraries",
        good,
        f"{system} {machine}, {threads} threads",
        "use an x86-64 or AArch64 machine",
    )


def _gpu_targets() -> list[Finding]:
    """Building and verifying for GPUs, which a machine without one can do as well."""
    if _version("apache-tvm") is None:
        return []
    from awq_compile.targets import resolve_target
    from awq_compile.verify.execution import device_words, missing, unbuildable

    found = []
    for name in ("cuda", "vulkan", "metal", "opencl"):
        target = resolve_target(name)
        for what, reason, how in (
            ("compile for", unbuildable(target), "yes"),
            ("verify kernels of", missing(target), f"yes, {device_words(target)}"),
        ):
            problem, _, fix = (reason or "").partition("; ")
            found.append(Finding(f"{what} {name}", reason is None, problem or how, fix, needed=False))
    return found


def _cache() -> Finding:
    from awq_compile import settings
    from awq_compile.artifact import check_writable
    from awq_compile.errors import EnvironmentMissingError

    folder = settings.cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    try:
        check_writable(folder, "AWQ_COMPILE_CACHE", folder)
        writable = True
    except EnvironmentMissingError:
        writable = False
    found = f"{folder}, {nbytes(free)} free" + ("" if writable else ", not writable")
    return Finding("keep checkpoints", writable, found, "export AWQ_COMPILE_CACHE=DIR")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding(
        "memory", memory.total >= 4e9, f"{nbytes(memory.total)}, {nbytes(memory.available)} free", "4 GB are needed"
    )


def _adb() -> Finding:
    path = shutil.which("adb")
    return Finding("deploy to Android phones", path is not None, path or "no adb", "apt-get install adb", needed=False)


def _optional(what: str, package: str) -> Finding:
    good = importlib.util.find_spec(package) is not None
    return Finding(what, good, f"{package} {_version(package) or 'absent'}", f"pip install {package}", needed=False)
