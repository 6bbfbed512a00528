"""What a Windows library needs beyond its objects: import libraries, an entry point, two missing functions.

A DLL names the DLL of every symbol that it takes from outside. TVM's are in `tvm_ffi.dll`, as its wheel for
Windows has it; those of C in `ucrtbase.dll`, a part of Windows 10 and later. Nothing of a C runtime is
linked in, so no SDK is needed. Only x86-64 objects in the GNU convention are linked: others stay an archive.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

FFI_DLL: Final = "tvm_ffi.dll"
C_DLL: Final = "ucrtbase.dll"
_C_NAMES: Final = """
  memcmp memcpy memmove memset
  acos asin atan atan2 cbrt ceil copysign cos cosh erf exp exp2 expm1 floor fma fmod ldexp log log10 log1p log2
  nearbyint pow rint round sin sinh sqrt tan tanh trunc
  acosf asinf atanf atan2f cbrtf ceilf copysignf cosf coshf erff expf exp2f expm1f floorf fmaf fmodf logf log10f
  log1pf log2f nearbyintf powf rintf roundf sinf sinhf sqrtf tanf tanhf truncf
"""

# LLVM asks for sincosf where a program takes both of an angle, and for ___chkstk_ms, which touches every page
# of a large stack frame in order, size in rax, all registers kept ("x64 prolog and epilog", Microsoft).
SUPPORT: Final = r"""
int DllMainCRTStartup(void *module, unsigned reason, void *reserved) { return 1; }
int _fltused = 0;
float sinf(float);
float cosf(float);
double sin(double);
double cos(double);
void sincosf(float x, float *s, float *c) { *s = sinf(x); *c = cosf(x); }
void sincos(double x, double *s, double *c) { *s = sin(x); *c = cos(x); }
__asm__(".globl ___chkstk_ms\n___chkstk_ms:\n"
        "  push %rcx\n  push %rax\n  cmp $0x1000, %rax\n  lea 24(%rsp), %rcx\n  jb 1f\n"
        "2:\n  sub $0x1000, %rcx\n  orl $0, (%rcx)\n  sub $0x1000, %rax\n  cmp $0x1000, %rax\n  ja 2b\n"
        "1:\n  sub %rax, %rcx\n  orl $0, (%rcx)\n  pop %rax\n  pop %rcx\n  ret\n");
"""


def ffi_symbols(objects: Iterable[Path]) -> list[str]:
    """Names of TVM's entry points in the string tables of COFF objects."""
    found: set[bytes] = set()
    for path in objects:
        data = path.read_bytes()
        table, count = struct.unpack_from("<II", data, 8)  # PointerToSymbolTable, NumberOfSymbols
        found |= {name for name in data[table + 18 * count + 4 :].split(b"\0") if re.fullmatch(rb"TVMFFI\w+", name)}
    return sorted(name.decode() for name in found)


def support_files(folder: Path, objects: Sequence[Path], zig: Callable[[list[str]], None]) -> list[str]:
    """Writes into `folder` what is linked with the objects; `zig` runs a command of zig. The linker's arguments."""
    (folder / "support.c").write_text(SUPPORT, encoding="utf-8")
    libraries = []
    for dll, names in ((FFI_DLL, ffi_symbols(objects)), (C_DLL, _C_NAMES.split())):
        stem = folder / Path(dll).stem
        definition = "\n  ".join((f"LIBRARY {dll}\nEXPORTS", *names))
        stem.with_suffix(".def").write_text(definition + "\n", encoding="utf-8")
        library = str(stem.with_suffix(".lib"))
        zig(["dlltool", "-m", "i386:x86-64", "-D", dll, "-d", str(stem.with_suffix(".def")), "-l", library])
        libraries.append(library)
    return ["-fno-builtin", "-O1", "-s", str(folder / "support.c"), *libraries]
