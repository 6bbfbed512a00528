"""Linking libraries for any system, by zig: no compiler or SDK of that system is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from awq_compile import settings
from awq_compile.errors import CompileError, EnvironmentMissingError

_LINKED: Final = {"linux": ".so", "android": ".so", "macos": ".dylib", "darwin": ".dylib"}


def library_suffix(triple: str) -> str:
    """Of the shared libraries of a system; `.tar`, an archive of objects, where none is linked here."""
    return next((suffix for key, suffix in _LINKED.items() if key in triple), ".tar")


def zig_target(triple: str) -> str:
    """An LLVM triple in zig's words: `arm64-apple-macos` is aarch64-macos."""
    arch, *rest = triple.split("-")
    arch = "aarch64" if arch == "arm64" else arch
    if any(part.startswith(("macos", "darwin")) for part in rest):
        return f"{arch}-macos"
    if any("android" in part for part in rest):
        return f"{arch}-linux-android"
    if any(part.startswith("linux") for part in rest):
        return f"{arch}-linux-{'musl' if any('musl' in part for part in rest) else 'gnu'}"
    return f"{arch}-{rest[-1]}"


def link_shared(triple: str, output: Path, objects: list[Path]) -> None:
    """`zig cc -shared` without any standard library: TVM's symbols and libm are those of the process."""
    target = zig_target(triple)
    macos = ["-undefined", "dynamic_lookup", f"-Wl,-install_name,@rpath/{output.name}"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-nostdlib", "-g0"]
    command += [*(macos if target.endswith("macos") else []), "-o", str(output), *map(str, objects)]
    cache = str(settings.cache_dir() / "zig")
    environment = settings.environment() | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise EnvironmentMissingError(f"the linker could not be started: {error}", hint="pip install ziglang") from None
    if done.returncode:
        raise CompileError(f"linking {output.name} failed: {done.stderr.strip()[-2000:]}", hint="pip install ziglang")
