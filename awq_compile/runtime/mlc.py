"""Hands a DIST over to MLC's own engine, where the package `mlc_llm` is installed and can load the library."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from awq_compile import settings
from awq_compile.errors import ArtifactError, EnvironmentMissingError
from awq_compile.manifest import Dist

# MLC's packages bring a TVM of their own, so they want an environment of their own.
INSTALL: Final = (
    "python3 -m venv mlc && mlc/bin/pip install --pre -U -f https://mlc.ai/wheels mlc-llm-nightly-cpu "
    "mlc-ai-nightly-cpu && export AWQ_COMPILE_MLC_PYTHON=$PWD/mlc/bin/python"
)

_DEVICES: Final = {"llvm": "cpu", "cuda": "cuda", "vulkan": "vulkan", "metal": "metal", "opencl": "opencl"}
_PROBE_SECONDS: Final = 300
_PROBE: Final = """
import importlib.util, json, sys
found = {"error": None}
try:
    missing = importlib.util.find_spec("mlc_llm") is None
    if not missing:
        import tvm, mlc_llm
        found |= {"tvm": str(tvm.__version__), "engine": hasattr(mlc_llm, "MLCEngine")}
        tvm.runtime.load_module(sys.argv[1])["vm_load_executable"]
    found["missing"] = missing
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\nprobe:" + json.dumps(found))
"""


@dataclass(frozen=True)
class HandOver:
    """A model directory, its library and its device, checked; MLC's command line takes over."""

    python: str
    model: Path
    library: Path
    device: str
    warning: str  # what may go wrong all the same; empty for nothing

    def command(self, verb: str, *words: str) -> list[str]:
        """`python -m mlc_llm VERB MODEL …`."""
        where = ("--model-lib", str(self.library), "--device", self.device)
        return [self.python, "-m", "mlc_llm", verb, str(self.model), *where, *words]


def hand_over_to(command: list[str]) -> NoReturn:
    """Becomes the command: its output, its signals and its exit code are this program's."""
    os.execvpe(command[0], command, _environment())


def _environment() -> dict[str, str]:
    """Ours, without the working directory as a place for modules: a mlc_llm.py there is not run."""
    return settings.environment() | {"PYTHONSAFEPATH": "1"}


def find_mlc(dist: Dist, target: str | None = None) -> HandOver:
    """Checks that MLC is installed and that its TVM loads the library for `target` (without: the first not for an app).

    Raises `EnvironmentMissingError` when it is not, and `ArtifactError` for a library that no engine here can load.
    """
    devices = {
        name: _DEVICES[kind]
        for name, entry in dist.manifest.libraries.items()
        if (kind := entry.tvm_target.get("kind")) in _DEVICES and not entry.path.endswith(".tar")
    }
    name = target or next(iter(devices), None)
    library = dist.library(name)
    if name is None or name not in devices:
        raise ArtifactError(
            f"{library} is for an app and cannot be loaded here",
            hint=f"--target {next(iter(devices))}" if devices else "awq-compile MODEL --target cpu",
        )
    dist.verify_file(library)  # code is about to run: a changed byte may do anything
    python = settings.mlc_python()
    found = _probe(python, library)
    made, has = dist.manifest.versions.get("apache-tvm", "unknown"), found.get("tvm", "none")
    if found["missing"]:
        raise EnvironmentMissingError(f"the package mlc_llm is not installed in {python}", hint=INSTALL)
    if not found.get("engine"):
        why = found["error"] or "it has no MLCEngine"
        raise EnvironmentMissingError(f"the package mlc_llm of {python} cannot be used: {why:.400}", hint=INSTALL)
    if found["error"]:
        raise EnvironmentMissingError(
            f"{library} was made by TVM {made}, and MLC's TVM {has} does not load it: {found['error']:.400}",
            hint=f"build mlc_llm on apache-tvm {made}: https://llm.mlc.ai/docs/install/mlc_llm.html",
        )
    differs = made.split(".")[:2] != has.split(".")[:2]
    warning = f"the library was made by TVM {made}, and MLC's is {has}: it loads, more is not known" if differs else ""
    return HandOver(python, dist.path.resolve(), library.resolve(), devices[name], warning)


def _probe(python: str, library: Path) -> dict[str, Any]:
    """What an MLC package says of itself and of the library, in a process of its own."""
    failed: dict[str, Any] = {"missing": False, "engine": False}
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, str(library.resolve())],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            env=_environment(),
        )
    except OSError as error:
        raise EnvironmentMissingError(
            f"{python} cannot be run: {error.strerror}", hint="AWQ_COMPILE_MLC_PYTHON names a Python that has mlc_llm"
        ) from None
    except subprocess.TimeoutExpired:
        return failed | {"error": f"importing it took more than {_PROBE_SECONDS} s"}
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("probe:")), None)
    if line is None:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return failed | {"error": f"importing it ended with {done.returncode}: {why}"}
    data: dict[str, Any] = json.loads(line.removeprefix("probe:"))
    return {"missing": False} | data
