"""Compiles translated kernels with zig, once: libraries are kept in the cache under a hash of all that matters."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from awq_compile import settings
from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.verify.executors.simt_source import ShimSource

_FLAGS: Final = (
    *(
        "-x",
        "c++",
        "-std=gnu++20",
        "-O2",
        "-g0",
        "-shared",
        "-fPIC",
        "-nostdinc++",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-threadsafe-statics",
    ),
    *("-w", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none"),
    "-ftrivial-auto-var-init=pattern",  # local arrays start as NaN
    *("-fno-sanitize=all", "-fsanitize=array-bounds", "-fsanitize-trap=all"),
)


def compile_shim(source: ShimSource) -> Path:
    """A shared library with the kernels of `source`. Raises `CompileError` with the compiler's words."""
    command = [*_FLAGS, "-target", f"{_arch()}-linux-gnu", f"-mcpu={_processor()}"]
    include = Path(str(files("awq_compile.verify.executors") / "simt_include"))
    key = hashlib.sha256("\0".join([*command, _headers(), _zig_version(), source.text]).encode()).hexdigest()[:32]
    folder = settings.cache_folder("simt")
    library = folder / f"{key}.so"
    if library.is_file():
        return library
    text, partial = folder / f".{key}.{os.getpid()}.cc", folder / f".{key}.{os.getpid()}.so"
    text.write_text(source.text, encoding="utf-8")
    try:
        paths = ["-I", str(include), "-I", str(include / source.language), "-o", str(partial), str(text)]
        _zig(["cc", *command, *paths])
        partial.replace(library)
    finally:
        text.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return library


def _arch() -> str:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        raise EnvironmentMissingError(
            f"CUDA and Metal kernels run on Linux x86-64 and AArch64 CPUs, and this is {sys.platform} {machine}",
            hint="verify on a Linux machine",
        )
    return machine


@cache
def _processor() -> str:
    """x86-64-v3 has the conversions of half precision, without which it is slow."""
    if _arch() != "x86_64":
        return "generic"
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if Path("/proc/cpuinfo").exists() else ""
    )
    return "x86_64_v3" if " avx2 " in flags and " f16c " in flags else "x86_64"


@cache
def _headers() -> str:
    include = Path(str(files("awq_compile.verify.executors") / "simt_include"))
    return "".join(p.read_text(encoding="utf-8") for p in sorted(include.rglob("*")) if p.is_file())


@cache
def _zig_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ziglang")
    except PackageNotFoundError:
        raise EnvironmentMissingError("ziglang is not installed", hint="pip install ziglang") from None


def _zig(arguments: list[str]) -> None:
    cache_dir = str(settings.cache_dir() / "zig")
    environment = {"ZIG_GLOBAL_CACHE_DIR": cache_dir, "ZIG_LOCAL_CACHE_DIR": cache_dir}
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments],
        capture_output=True,
        text=True,
        env={**settings.environment(), **environment},
    )
    if done.returncode:
        raise CompileError(f"the kernels do not compile for the CPU: {done.stderr.strip()[:3000]}")
