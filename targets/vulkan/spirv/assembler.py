"""The binary form of a module: sections in the order that the specification demands, and ids.

An instruction is a word `length << 16 | opcode` and its operands. Nothing here knows what they mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from awq_compile.targets.vulkan.spirv.enums import GLSL450_MEMORY, GLSL_STD_450, LOGICAL, Capability, Op

Words = list[int]

_MAGIC = 0x07230203
_VERSION_1_3 = 0x00010300  # what Vulkan 1.1 guarantees
_GENERATOR = 0  # unregistered


def instruction(op: int, *operands: int) -> Words:
    """The words of one instruction."""
    return [(len(operands) + 1) << 16 | op, *operands]


def text(value: str) -> Words:
    """A literal string: UTF-8, ended by a zero, padded to words."""
    data = value.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))


class Assembler:
    """A module under construction. Sections are lists of words; `finish` joins them."""

    def __init__(self) -> None:
        self._bound = 1
        self._capabilities: set[Capability] = set()
        self._extensions: set[str] = set()
        self._glsl: int | None = None
        self.entry: Words = []
        self.names: Words = []
        self.annotations: Words = []
        self.globals: Words = []
        self.functions: Words = []

    def new_id(self) -> int:
        """An id that nothing uses yet."""
        self._bound += 1
        return self._bound - 1

    def require(self, capability: Capability, extension: str | None = None) -> None:
        """Declares a capability, and the extension that brings it."""
        self._capabilities.add(capability)
        if extension is not None:
            self._extensions.add(extension)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What has been required so far."""
        return frozenset(self._capabilities)

    def glsl(self) -> int:
        """The id of the GLSL.std.450 instruction set, imported when first asked for."""
        if self._glsl is None:
            self._glsl = self.new_id()
        return self._glsl

    def name(self, target: int, name: str) -> None:
        """A name for debuggers."""
        self.names += instruction(Op.NAME, target, *text(name))

    def decorate(self, target: int, decoration: int, *operands: int) -> None:
        """Decorates an id."""
        self.annotations += instruction(Op.DECORATE, target, decoration, *operands)

    def finish(self) -> Words:
        """The whole module."""
        words = [_MAGIC, _VERSION_1_3, _GENERATOR, self._bound, 0]
        for capability in sorted(self._capabilities):
            words += instruction(Op.CAPABILITY, capability)
        for extension in sorted(self._extensions):
            words += instruction(Op.EXTENSION, *text(extension))
        if self._glsl is not None:
            words += instruction(Op.EXT_INST_IMPORT, self._glsl, *text(GLSL_STD_450))
        words += instruction(Op.MEMORY_MODEL, LOGICAL, GLSL450_MEMORY)
        for section in (self.entry, self.names, self.annotations, self.globals, self.functions):
            words += section
        return words


def to_bytes(words: Iterable[int]) -> bytes:
    """Little-endian bytes of words."""
    items = list(words)
    return struct.pack(f"<{len(items)}I", *items)
