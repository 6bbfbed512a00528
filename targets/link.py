"""Linking libraries for any system, by zig: no compiler or SDK of that system is needed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from awq_compile import settings
from awq_compile.errors import CompileError, EnvironmentMissingError, UsageError
from awq_compile.targets.windows import support_files

_ROOM_BYTES: Final = 1 << 20  # free space beyond the objects' own size below which a failed linker had too little
_TRIPLE: Final = re.compile(r"[a-z0-9_.]+(-[a-z0-9_.]+){1,3}")
_LINKED: Final = {"linux": ".so", "android": ".so", "macos": ".dylib", "darwin": ".dylib"}


def check_triple(target: str, triple: str) -> None:
    """Raises `UsageError` unless the host in a target's name is an LLVM triple."""
    if not _TRIPLE.fullmatch(triple):
        raise UsageError(
            f"{target}: {triple!r} is not an LLVM triple, as x86_64-linux-gnu is", hint="awq-compile targets lists some"
        )


def library_suffix(triple: str) -> str:
    """Of the shared libraries of a system; `.tar`, an archive of objects, where none is linked here."""
    if zig_target(triple) == "x86_64-windows-gnu":
        return ".dll"
    return next((suffix for key, suffix in _LINKED.items() if key in triple), ".tar")


def llvm_triple(triple: str) -> str:
    """With the vendor that LLVM needs in order to see the system: x86_64-windows-gnu is x86_64-pc-windows-gnu."""
    arch, *rest = triple.split("-")
    return f"{arch}-pc-{'-'.join(rest)}" if rest and rest[0] == "windows" else triple


def zig_target(triple: str) -> str:
    """An LLVM triple in zig's words: `arm64-apple-macos` is aarch64-macos."""
    arch, *rest = triple.split("-")
    arch = "aarch64" if arch == "arm64" else arch
    if any(part.startswith(("macos", "darwin")) for part in rest):
        return f"{arch}-macos"
    if any("android" in part for part in rest):
        return f"{arch}-linux-android"
    if "windows" in rest:
        return f"{arch}-windows-{rest[-1]}"
    if any(part.startswith("linux") for part in rest):
        return f"{arch}-linux-{'musl' if any('musl' in part for part in rest) else 'gnu'}"
    return f"{arch}-{rest[-1]}"


def link_shared(triple: str, output: Path, objects: list[Path]) -> None:
    """`zig cc -shared` without any standard library: TVM's symbols and libm are those of the process.

    Windows wants to know whose they are: see `windows`. A compiler driver that the user names for the target
    (`settings.linker`) takes zig's place.
    """
    target, needed = zig_target(triple), sum(path.stat().st_size for path in objects)
    with tempfile.TemporaryDirectory(prefix="awq-link-") as folder:  # the linker leaves files where it runs

        def zig(command: list[str]) -> None:
            _zig(command, output, Path(folder), needed)

        extra = []
        if target.endswith("macos"):
            extra = ["-undefined", "dynamic_lookup", f"-Wl,-install_name,@rpath/{output.name}"]
        elif target == "x86_64-windows-gnu":
            extra = support_files(Path(folder), objects, zig)
        inputs = [str(path.resolve()) for path in objects]
        arguments = ["-shared", "-nostdlib", "-g0", *extra, "-o", str(output.resolve()), *inputs]
        if linker := settings.linker():
            _run([*linker, *arguments], output, Path(folder), needed, "check AWQ_COMPILE_LINKER")
        else:
            zig(["cc", "-target", target, *arguments])


def init_once_object(triple: str, folder: Path) -> Path:
    """An object that an app's runtime may lack, see init_once.c; freestanding, so no SDK is needed."""
    output = folder.resolve() / "init_once.o"
    with as_file(files("awq_compile.targets") / "init_once.c") as source:
        options = ["-c", "-O2", "-fPIC", "-ffreestanding", "-g0"]
        arguments = ["-target", zig_target(triple), *options, "-o", str(output), str(source.resolve())]
        _zig(["cc", *arguments], output, folder, 0)
    return output


def _zig(command: list[str], output: Path, folder: Path, needed: int) -> None:
    _run([sys.executable, "-m", "ziglang", *command], output, folder, needed, "pip install ziglang")


def _run(command: list[str], output: Path, folder: Path, needed: int, hint: str) -> None:
    """Runs a linker in `folder`; `needed` are the bytes that the output takes at least."""
    cache = str(settings.cache_dir().resolve() / "zig")
    environment = settings.environment() | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    except OSError as error:
        raise EnvironmentMissingError(f"the linker could not be started: {error}", hint=hint) from None
    if done.returncode == 0:
        return
    for place in (output.parent, folder, settings.cache_dir()):  # a linker without space may end without a word
        if place.exists() and (free := shutil.disk_usage(place).free) < needed + _ROOM_BYTES:
            raise EnvironmentMissingError(
                f"cannot link {output.name}: the disk is full, {place} has {free} bytes free",
                hint="free some space, or choose another folder with -o DIR",
            )
    why = done.stderr.strip()[-2000:] or done.stdout.strip()[-2000:] or _ended(done.returncode)
    raise CompileError(f"linking {output.name} failed: {why}", hint=hint)


def _ended(status: int) -> str:
    """How a linker ended that said nothing; a negative status is that of a signal."""
    return f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with exit status {status}"
