"""Buffers: where they live, and loads and stores of any number of lanes.

An access is a run of scalars that starts at `index * lanes`, or one such run per lane of a vector index. A
run is cut into pieces as wide as its start is known to be aligned. A storage buffer is declared once per
(scalar type, width) in which it is accessed, all at its binding and marked Aliased. An array in workgroup
or function memory has one type, and narrower pieces of it are components.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.arithmetic import Arithmetic, Value
from awq_compile.targets.vulkan.spirv.enums import VOLATILE, Decoration, Op, StorageClass
from awq_compile.targets.vulkan.spirv.indexing import IndexEmitter, Run
from awq_compile.targets.vulkan.spirv.types import BOOL, UINT32, DType

_BYTE = DType("uint", 8)


@dataclass
class StorageBuffer:
    """A pointer parameter. `views` holds a variable for each (kind, bits, width) of access."""

    binding: int
    name: str
    views: dict[tuple[str, int, int], int] = field(default_factory=dict)
    is_read: bool = False
    is_written: bool = False


@dataclass(frozen=True)
class Array:
    """A variable in workgroup or function memory: `length` vectors of `width` scalars of type `element`."""

    storage: StorageClass
    name: str
    element: DType
    width: int
    length: int
    variable: int
    volatile: bool

    @property
    def bytes(self) -> int:
        return self.length * self.width * self.element.bytes


@dataclass(frozen=True)
class View:
    """Memory seen as elements of `dtype`, which may have lanes."""

    memory: StorageBuffer | Array
    dtype: DType


class Memory:
    """Emits accesses. `read_only` names the bindings that the kernel never writes: their loads are values."""

    packs_halves = False  # set where the device computes with 16-bit values

    def __init__(self, arithmetic: Arithmetic, index: IndexEmitter, read_only: frozenset[int], no_alias: bool) -> None:
        self.arithmetic = arithmetic
        self.builder = arithmetic.builder
        self.types = arithmetic.types
        self.index = index
        self.read_only = read_only
        self.no_alias = no_alias
        self.shared_bytes = 0
        self.has_barrier = False

    # --- declarations

    def allocate(self, storage: StorageClass, name: str, dtype: DType, count: int, *, volatile: bool) -> View:
        """An array of `count` elements of `dtype`."""
        if dtype.kind != "bool":
            self.types.use(dtype)
        width = dtype.lanes if dtype.lanes <= 4 else max(w for w in (4, 2, 1) if dtype.lanes % w == 0)
        length = count * dtype.lanes // width
        array = self.types.array(self.types.vector(dtype, width), length)
        if storage == StorageClass.WORKGROUP:
            variable = self.types.global_variable(storage, array)
        else:
            variable = self.builder.local(array)
        memory = Array(storage, name, dtype.element, width, length, variable, volatile)
        if storage == StorageClass.WORKGROUP:
            self.shared_bytes += memory.bytes
        return View(memory, dtype)

    def finish(self, buffers: list[StorageBuffer]) -> None:
        """Decorates the storage buffers, now that all accesses are known."""
        for buffer in buffers:
            decorations: list[Decoration] = []
            if len(buffer.views) > 1 or not self.no_alias:
                decorations.append(Decoration.ALIASED)
            if not buffer.is_written:
                decorations.append(Decoration.NON_WRITABLE)
            elif buffer.is_read and self.has_barrier:
                decorations.append(Decoration.COHERENT)  # what a thread wrote, others may read behind a barrier
            for variable in buffer.views.values():
                for decoration in decorations:
                    self.builder.asm.decorate(variable, decoration)

    def _view_of(self, buffer: StorageBuffer, dtype: DType, width: int) -> int:
        key = ("float" if dtype.kind == "float" else "int", dtype.bits, width)
        if key not in buffer.views:
            variable = self.types.global_variable(StorageClass.STORAGE_BUFFER, self.types.buffer(dtype, width))
            self.builder.asm.decorate(variable, Decoration.DESCRIPTOR_SET, 0)
            self.builder.asm.decorate(variable, Decoration.BINDING, buffer.binding)
            if not buffer.views:
                self.builder.asm.name(variable, buffer.name)
            buffer.views[key] = variable
        return buffer.views[key]

    # --- accesses

    def load(self, view: View, index: Any, dtype: DType) -> Value:
        """`view[index]` as `dtype`."""
        stored = self._stored(view, dtype)
        parts: list[tuple[int, int]] = []
        for run in self.index.runs(index, view.dtype.lanes):
            if self._is_packed(view.memory, stored, run):
                parts += self._load_packed(view.memory, stored, run)
                continue
            for pointer, _, width in self._pieces(view.memory, stored.element, run, writes=False):
                parts.append((self._load_piece(view.memory, pointer, self.types.vector(stored, width)), width))
        return self._loaded(self._assemble(stored, parts), dtype)

    def store(self, view: View, index: Any, value: Value) -> None:
        """`view[index] = value`."""
        stored = self._stored(view, value.dtype)
        if stored.kind != value.dtype.kind and value.dtype.kind == "bool":
            number = self.arithmetic.cast(UINT32.with_lanes(stored.lanes), value)
            value = self.arithmetic.cast(stored, number)
        elif stored != value.dtype:
            value = self.arithmetic.bitcast(stored, value)
        volatile = (VOLATILE,) if isinstance(view.memory, Array) and view.memory.volatile else ()
        position = 0
        for run in self.index.runs(index, view.dtype.lanes):
            if self._is_packed(view.memory, stored, run):
                self._store_packed(view.memory, value, run, position)
                position += run.count
                continue
            for pointer, offset, width in self._pieces(view.memory, stored.element, run, writes=True):
                self.builder.effect(Op.STORE, pointer, self._cut(value, position + offset, width), *volatile)
            position += run.count

    def pointer(self, view: View, index: Any) -> int:
        """To the scalar `view[index]`, for atomics."""
        ((pointer, _, _),) = self._pieces(view.memory, view.dtype.element, Run(index, 1, 0, 1), writes=True)
        return pointer

    def _stored(self, view: View, dtype: DType) -> DType:
        """The type in memory of `dtype`."""
        if dtype.kind == "bool" and isinstance(view.memory, StorageBuffer):
            return _BYTE.with_lanes(dtype.lanes)
        if isinstance(view.memory, StorageBuffer):
            return dtype
        element = view.memory.element
        if element.bits != dtype.bits or (element.kind == "bool") != (dtype.kind == "bool"):
            raise CompileError(f"Vulkan: {view.memory.name} holds {element} and is accessed as {dtype}")
        return element.with_lanes(dtype.lanes)

    def _loaded(self, value: Value, dtype: DType) -> Value:
        if value.dtype == dtype:
            return value
        if dtype.kind == "bool":
            wide = self.arithmetic.cast(UINT32.with_lanes(dtype.lanes), value)
            return self.arithmetic.cast(BOOL.with_lanes(dtype.lanes), wide)
        return self.arithmetic.bitcast(dtype, value)

    # --- pieces

    def _pieces(
        self, memory: StorageBuffer | Array, element: DType, run: Run, *, writes: bool
    ) -> list[tuple[int, int, int]]:
        """(pointer, offset within the run, width) of the accesses that make up a run."""
        found, offset = [], 0
        while offset < run.count:
            width = self._width(memory, run, offset)
            found.append((self._pointer(memory, element, run, offset, width, writes=writes), offset, width))
            offset += width
        return found

    def _width(self, memory: StorageBuffer | Array, run: Run, offset: int) -> int:
        """Of the widest piece that may start at `offset`."""
        widths = (memory.width,) if isinstance(memory, Array) else (4, 2)
        left = run.count - offset
        if left == 1 or widths == (1,):
            return 1
        known = run.scale * self.index.multiple(run.start)
        return next((w for w in widths if w <= left and known % w == 0 and (run.offset + offset) % w == 0), 1)

    def _pointer(
        self, memory: StorageBuffer | Array, element: DType, run: Run, offset: int, width: int, *, writes: bool
    ) -> int:
        vector = self.types.vector(element, width)
        if isinstance(memory, StorageBuffer):
            memory.is_written |= writes
            memory.is_read |= not writes
            base = self._view_of(memory, element, width)
            kind = self.types.pointer(StorageClass.STORAGE_BUFFER, vector)
            chain: tuple[int, ...] = (self.types.integer(UINT32, 0), self._position(run, offset, width))
        else:
            base, kind = memory.variable, self.types.pointer(memory.storage, vector)
            if width == memory.width:
                chain = (self._position(run, offset, width),)
            elif run.scale % memory.width == 0:
                whole, component = divmod(run.offset + offset, memory.width)
                start = self._position(run, whole * memory.width - run.offset, memory.width)
                chain = (start, self.types.integer(UINT32, component))
            else:
                chain = self._component(run, offset, memory.width)
        return self.builder.pure(Op.ACCESS_CHAIN, kind, base, *chain)

    def _position(self, run: Run, offset: int, width: int) -> int:
        """(start * scale + run.offset + offset) / width, which is whole."""
        scale, constant = run.scale, (run.offset + offset) // width
        common = gcd(scale, width)
        position = self.index.emit(run.start, width // common)
        return self.index.plus(self.index.scaled(position, scale // common), constant)

    def _component(self, run: Run, offset: int, width: int) -> tuple[int, int]:
        """(vector, component) of a scalar in an array of vectors, at run time."""
        position = self._position(run, offset, 1)
        kind, constant = self.types.vector(UINT32, 1), self.types.integer(UINT32, width)
        return (
            self.builder.pure(Op.U_DIV, kind, position, constant),
            self.builder.pure(Op.U_MOD, kind, position, constant),
        )

    # --- 16-bit values, eight at a time: 16 bytes are the widest access, and four of them are half of it

    def _is_packed(self, memory: StorageBuffer | Array, dtype: DType, run: Run) -> bool:
        """Whether a run consists of aligned eights that are accessed as four words each."""
        if not self.packs_halves or not isinstance(memory, StorageBuffer) or dtype.bits != 16 or run.count % 8:
            return False
        return run.offset % 8 == 0 and run.scale * self.index.multiple(run.start) % 8 == 0

    def _packed_pointer(self, memory: StorageBuffer | Array, run: Run, offset: int, *, writes: bool) -> int:
        """To the four words at `offset` of a run."""
        assert isinstance(memory, StorageBuffer)
        memory.is_written |= writes
        memory.is_read |= not writes
        kind = self.types.pointer(StorageClass.STORAGE_BUFFER, self.types.vector(UINT32, 4))
        chain = (self.types.integer(UINT32, 0), self._position(run, offset, 8))
        return self.builder.pure(Op.ACCESS_CHAIN, kind, self._view_of(memory, UINT32, 4), *chain)

    def _load_packed(self, memory: StorageBuffer | Array, dtype: DType, run: Run) -> list[tuple[int, int]]:
        self.types.use(dtype)
        words, pair, half = (self.types.vector(t, n) for t, n in ((UINT32, 4), (UINT32, 2), (dtype, 4)))
        parts = []
        for offset in range(0, run.count, 8):
            loaded = self._load_piece(memory, self._packed_pointer(memory, run, offset, writes=False), words)
            for first in (0, 2):
                two = self.builder.pure(Op.VECTOR_SHUFFLE, pair, loaded, loaded, first, first + 1)
                parts.append((self.builder.pure(Op.BITCAST, half, two), 4))
        return parts

    def _store_packed(self, memory: StorageBuffer | Array, value: Value, run: Run, position: int) -> None:
        self.types.use(value.dtype)
        words, pair = self.types.vector(UINT32, 4), self.types.vector(UINT32, 2)
        for offset in range(0, run.count, 8):
            halves = [self._cut(value, position + offset + k, 4) for k in (0, 4)]
            two = [self.builder.pure(Op.BITCAST, pair, half) for half in halves]
            packed = self.builder.pure(Op.COMPOSITE_CONSTRUCT, words, *two)
            self.builder.effect(Op.STORE, self._packed_pointer(memory, run, offset, writes=True), packed)

    # --- values from pieces and back

    def _load_piece(self, memory: StorageBuffer | Array, pointer: int, kind: int) -> int:
        if isinstance(memory, StorageBuffer):
            if self.no_alias and memory.binding in self.read_only:
                return self.builder.pure(Op.LOAD, kind, pointer)
            return self.builder.value(Op.LOAD, kind, pointer)
        return self.builder.value(Op.LOAD, kind, pointer, *((VOLATILE,) if memory.volatile else ()))

    def _assemble(self, dtype: DType, parts: list[tuple[int, int]]) -> Value:
        """A value from (vector, width) in the order of its lanes."""
        if tuple(width for _, width in parts) == dtype.widths:
            return Value(dtype, tuple(part for part, _ in parts))
        scalars = [s for part, width in parts for s in self.arithmetic.scalars(Value(dtype.with_lanes(width), (part,)))]
        return self.arithmetic.gather(dtype, scalars)

    def _cut(self, value: Value, start: int, width: int) -> int:
        """The vector of `width` lanes of `value` from lane `start` on."""
        lane = 0
        for part, lanes in zip(value.ids, value.dtype.widths, strict=True):
            if (lane, lanes) == (start, width):
                return part
            lane += lanes
        scalars = self.arithmetic.scalars(value)[start : start + width]
        return self.arithmetic.gather(value.dtype.with_lanes(width), scalars).ids[0]
