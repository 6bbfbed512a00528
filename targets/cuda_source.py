"""Ties CUDA machine code to the source it came from, so that checking the source checks the library.

The source ends in a constant with the SHA-256 of all before it. Compilers keep it, one copy in the machine
code of each architecture; the source lies beside the library as `lib/NAME.cu`. Who verifies runs that source
and compares the digests: no compiler and no GPU are needed.

    extern "C" __device__ const unsigned char awq_compile_source_sha256[32] = {18, 240, …};
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any, Final

from awq_compile.errors import ArtifactError

SYMBOL: Final = "awq_compile_source_sha256"
_FATBIN_MAGIC: Final = 0xBA55ED50
_FATBIN_HEADER: Final = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of all entries
_FATBIN_ENTRY: Final = struct.Struct("<HHIQ")  # kind, version, bytes of the header, bytes of the code
_KIND_PTX, _KIND_ELF = 1, 2
_NUMBERS: Final = r"\s*=\s*\{([\d,\s]+)\}\s*;"
_IN_SOURCE: Final = re.compile(rf'\nextern "C" __device__ const unsigned char {SYMBOL}\[32\]{_NUMBERS}\s*$')
_IN_PTX: Final = re.compile(rf"\b{SYMBOL}\[32\]{_NUMBERS}")


def with_digest(source: str) -> str:
    """The source with its digest behind it: what is compiled, and kept."""
    numbers = ", ".join(map(str, hashlib.sha256(source.encode()).digest()))
    return f'{source}\nextern "C" __device__ const unsigned char {SYMBOL}[32] = {{{numbers}}};\n'


def check_source(source: str, code: bytes, form: str) -> None:
    """Raises `ArtifactError` unless every machine code in `code` is of `source`; `form`: fatbin, cubin, ptx, cuda."""
    if form == "cuda":
        if code.decode("utf-8", errors="replace") != source:
            raise ArtifactError("the library's CUDA source is not the one that lies beside it")
        return
    match = _IN_SOURCE.search(source)
    if match is None:
        raise ArtifactError(f"the CUDA source does not end in {SYMBOL}: it is cut off, or of another program")
    digest = hashlib.sha256(source[: match.start()].encode()).digest()
    if digest != _bytes(match[1]):
        raise ArtifactError("the CUDA source was changed after it was compiled: its digest is not that of its text")
    found = digests(code, form)
    for i, other in enumerate(found):
        if other != digest:
            raise ArtifactError(
                f"machine code {i + 1} of {len(found)} in the library was compiled from another source: "
                f"SHA-256 {other.hex()[:16]}…, and the source has {digest.hex()[:16]}…"
            )


def digests(code: bytes, form: str) -> list[bytes]:
    """The digest in each machine code. Raises `ArtifactError` where one has none."""
    if form == "cubin":
        return [_in_cubin(code)]
    if form == "ptx":
        return [_in_ptx(code)]
    if form == "fatbin":
        return [_in_ptx(part) if kind == _KIND_PTX else _in_cubin(part) for kind, part in _fatbin_parts(code)]
    raise ArtifactError(f"CUDA code of the unknown format {form!r}")


def _fatbin_parts(data: bytes) -> list[tuple[int, bytes]]:
    """(kind, code) of the entries of a fatbin."""
    if len(data) < _FATBIN_HEADER.size:
        raise ArtifactError("the CUDA fatbin is cut off")
    magic, _, header_bytes, size = _FATBIN_HEADER.unpack_from(data)
    if magic != _FATBIN_MAGIC or header_bytes + size > len(data):
        raise ArtifactError("the CUDA code is not a fatbin, or is cut off")
    parts, at, end = [], header_bytes, header_bytes + size
    while at < end:
        if at + _FATBIN_ENTRY.size > end:
            raise ArtifactError("the CUDA fatbin is cut off")
        kind, _, header_bytes, size = _FATBIN_ENTRY.unpack_from(data, at)
        start, at = at + header_bytes, at + header_bytes + size
        if header_bytes < _FATBIN_ENTRY.size or at > end or kind not in (_KIND_PTX, _KIND_ELF):
            raise ArtifactError("the CUDA fatbin has a damaged entry")
        if kind == _KIND_ELF and not data.startswith(b"\x7fELF", start):
            raise ArtifactError("the CUDA fatbin is compressed: build it with nvcc --no-compress")
        parts.append((kind, data[start:at]))
    if not parts:
        raise ArtifactError("the CUDA fatbin is empty")
    return parts


def _in_cubin(data: bytes) -> bytes:
    import lief

    lief.logging.disable()
    parsed: Any = lief.parse(data)
    for symbol in parsed.symbols if isinstance(parsed, lief.ELF.Binary) else ():
        if symbol.name == SYMBOL and symbol.section is not None and symbol.size == 32:
            digest = bytes(symbol.section.content)[symbol.value : symbol.value + 32]
            if len(digest) == 32:
                return digest
    raise ArtifactError(f"the CUDA machine code does not say which source it is of: {SYMBOL} is missing")


def _in_ptx(data: bytes) -> bytes:
    match = _IN_PTX.search(data.decode("utf-8", errors="replace"))
    if match is None:
        raise ArtifactError(f"the PTX does not say which source it is of: {SYMBOL} is missing")
    return _bytes(match[1])


def _bytes(numbers: str) -> bytes:
    try:
        return bytes(int(n) for n in numbers.split(","))
    except ValueError:
        raise ArtifactError(f"{SYMBOL} does not hold 32 bytes") from None
