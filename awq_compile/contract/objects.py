"""Object files and libraries as data: their symbols and TVM's module blob. Nothing is loaded or run.

ELF, Mach-O and COFF, shared libraries and archives of objects alike, are read by lief. TVM leaves one symbol,
`__tvm_ffi__library_bin` (behind the system-lib prefix), with the module blob; `targets.vulkan.blob` has its layout.
A size that does not fit stops with `ArtifactError`.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lief

from awq_compile.errors import ArtifactError

LIBRARY_BIN: Final = "__tvm_ffi__library_bin"
_MAX_BYTES: Final = 1 << 32

lief.logging.disable()


@dataclass(frozen=True)
class ObjectFile:
    """One object file or library. Symbols are as C writes them: Mach-O's underscore is taken off."""

    name: str
    data: bytes
    defined: frozenset[str]  # that others can use
    undefined: frozenset[str]  # that others must give
    blob: bytes | None  # TVM's modules

    @property
    def prefix(self) -> str:
        """Of a system library: what stands before the symbol of the blob; empty where there is none."""
        return next((name.removesuffix(LIBRARY_BIN) for name in self.defined if name.endswith(LIBRARY_BIN)), "")


def read_objects(path: Path) -> list[ObjectFile]:
    """The objects of a library: itself, or the members of a `.tar`. Raises `ArtifactError` for anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    return [_parse(name, content) for name, content in _files(path.name, data)]


def module_blob(path: Path) -> bytes:
    """TVM's modules in a library. Raises `ArtifactError` where it has none."""
    for file in read_objects(path):
        if file.blob is not None:
            return file.blob
    raise ArtifactError(f"{path} has no symbol {LIBRARY_BIN}, so TVM did not write it")


def _files(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if not name.endswith(".tar"):
        yield name, data
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield f"{name}: {member.name}", file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArtifactError(f"{name} is not a tar archive: {error}") from None


def _parse(name: str, data: bytes) -> ObjectFile:
    parsed: Any = lief.parse(data)
    if parsed is None:
        raise ArtifactError(f"{name} is not an object file or library")
    if isinstance(parsed, lief.PE.Binary):
        defined, undefined = _dll_symbols(parsed)
    else:
        defined, undefined = _symbols(parsed)
    return ObjectFile(name, data, frozenset(defined), frozenset(undefined), _blob(name, parsed))


def _dll_symbols(parsed: Any) -> tuple[set[str], set[str]]:
    exported = parsed.get_export()
    imported = {str(entry.name) for library in parsed.imports for entry in library.entries}
    return {str(entry.name) for entry in exported.entries} if exported is not None else set(), imported


def _symbols(parsed: Any) -> tuple[set[str], set[str]]:
    """(defined, undefined); of a library those that take part in dynamic linking."""
    defined: set[str] = set()
    undefined: set[str] = set()
    symbol: Any
    if isinstance(parsed, lief.ELF.Binary):
        symbols = parsed.symbols if _is_relocatable(parsed) else parsed.dynamic_symbols
        for symbol in symbols:
            if symbol.binding == lief.ELF.Symbol.BINDING.LOCAL or not str(symbol.name):
                continue
            (undefined if symbol.shndx == 0 else defined).add(str(symbol.name))
    elif isinstance(parsed, lief.MachO.Binary):
        for symbol in parsed.symbols:
            if symbol.raw_type & 0xE0 == 0 and symbol.raw_type & 1 and str(symbol.name):  # N_STAB, N_EXT of nlist.h
                name = str(symbol.name).removeprefix("_")
                (undefined if symbol.raw_type & 0x0E == 0 else defined).add(name)  # N_TYPE is N_UNDF
    else:
        for symbol in parsed.symbols:
            if symbol.storage_class == lief.COFF.Symbol.STORAGE_CLASS.EXTERNAL and str(symbol.name):
                (undefined if symbol.section_idx == 0 and symbol.value == 0 else defined).add(str(symbol.name))
    return defined, undefined - defined


def _blob(name: str, parsed: Any) -> bytes | None:
    for section, offset in _places(parsed):
        content = bytes(section.content)
        size = int.from_bytes(content[offset : offset + 8], "little")
        left = len(content) - offset - 8
        if left < 0 or size > min(_MAX_BYTES, left):
            raise ArtifactError(f"{name}: the module blob announces {size} bytes, {left} are there")
        return content[offset : offset + 8 + size]
    return None


def _places(parsed: Any) -> Iterator[tuple[Any, int]]:
    """(section, offset) of each symbol that is the module blob."""
    if isinstance(parsed, lief.PE.Binary):
        exported = parsed.get_export()
        for entry in exported.entries if exported is not None else ():
            if str(entry.name).endswith(LIBRARY_BIN):
                section = parsed.section_from_rva(entry.address)
                if section is not None:
                    yield section, entry.address - section.virtual_address
        return
    for symbol in parsed.symbols:
        if not str(symbol.name).endswith(LIBRARY_BIN):
            continue
        if _is_relocatable(parsed):
            if symbol.section is not None:
                yield symbol.section, symbol.value
        else:
            for section in parsed.sections:
                if section.virtual_address <= symbol.value < section.virtual_address + section.size:
                    yield section, symbol.value - section.virtual_address


def _is_relocatable(parsed: Any) -> bool:
    """Whether symbols count from their section, as in COFF and ELF objects; Mach-O objects have addresses."""
    if isinstance(parsed, lief.ELF.Binary):
        return bool(parsed.header.file_type == lief.ELF.Header.FILE_TYPE.REL)
    return isinstance(parsed, lief.COFF.Binary)
