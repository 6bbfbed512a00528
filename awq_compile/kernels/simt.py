"""Threads of a GPU: index names, vector loads, how a thread decodes packed weights, sums across threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.simd import cast, ramp

Expr = Any
Buffer = Any


def workspace(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
    """Memory of the device from one kernel of a function to the next."""
    return IRBuilder.name(name, T.alloc_buffer(shape, dtype))


def barrier() -> None:
    """All threads of the block have written what the others read next."""
    T.evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


@contextmanager
def branch(condition: Expr, *, always: bool) -> Iterator[None]:
    """What follows only where `condition` holds; no branch where that is `always` so."""
    with ExitStack() as stack:
        if not always:
            stack.enter_context(T.If(condition))
            stack.enter_context(T.Then())
        yield


def lanes_of(value: Expr, lanes: int) -> list[Expr]:
    """The scalars of a vector."""
    return [value] if lanes == 1 else [tirx.Shuffle([value], [i]) for i in range(lanes)]


def load_vectors(load: Callable[[Expr], Expr], start: Expr, count: int, lanes: int) -> list[Expr]:
    """`count` consecutive scalars from `start` on, by loads of `lanes`; `load` reads at an index or ramp."""
    found: list[Expr] = []
    for i in range(0, count, lanes):
        found += lanes_of(T.bind(load(ramp(start + i, lanes))), lanes)
    return found


class Registers:
    """`count` values of a thread. TVM inlines a bound scalar wherever it is read; a buffer stays."""

    def __init__(self, count: int, dtype: str = "float32") -> None:
        self._buffer = T.alloc_buffer((count,), dtype, scope="local")

    def __getitem__(self, index: int) -> Expr:
        return self._buffer[index]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [index])

    def vector(self, index: int, lanes: int) -> Expr:
        """`lanes` of them from `index` on."""
        return self._buffer[ramp(index, lanes)]


def kept(value: Expr, dtype: str = "int32") -> Expr:
    """In a register: what is bound would be computed wherever it is read."""
    register = Registers(1, dtype)
    register[0] = value
    return register[0]


@dataclass(frozen=True)
class ThreadReader:
    """`unit` consecutive weights of one row, as one thread reads them: whole words, within one group.

    `in_place` leaves codes in their place in the word where their bits lie side by side: see `place`.
    """

    spec: WeightSpec
    unit: int
    magic: bool = False
    in_place: bool = False

    def split(self, index: Expr, columns: int, per_row: int) -> tuple[Expr, Expr]:
        """(column, unit) of piece `index` of a tile: neighbouring threads take what lies side by side."""
        if isinstance(self.spec, QuantSpec) and self.spec.order == "KN":
            return index % columns, index // columns
        return index // per_row, index % per_row

    @property
    def words(self) -> int:
        """Stored elements of a unit: uint32 words, or float16 weights."""
        return self.unit if isinstance(self.spec, Float16Spec) else self.unit * self.spec.bits // 32

    def load(self, read: Callable[[Expr], Expr], index: Expr) -> list[Expr]:
        """The words of unit `index` of a row, by loads of at most 16 bytes; in KN they lie rows apart."""
        kn = isinstance(self.spec, QuantSpec) and self.spec.order == "KN"
        most = 1 if kn else 4  # uint32x4 is the widest load of every GPU API; float16x4 the widest that Metal has
        lanes = next(lanes for lanes in (4, 2, 1) if lanes <= most and self.words % lanes == 0)
        return load_vectors(read, index * self.words, self.words, lanes)

    def value(self, words: list[Expr], element: int) -> Expr:
        """Weight `element` of the unit, as float32: a code, without its zero point, times 2^place."""
        if isinstance(self.spec, Float16Spec):
            return cast("float32", words[element], 1)
        bits = self.spec.bits
        if self._stay:
            mask = tirx.const(((1 << bits) - 1) << self.place(element), "uint32")
            return cast("float32", words[element * bits // 32] & mask, 1)
        code = self.spec.layout.code(lambda i: words[i], element)
        if self.magic:
            # 2^23 + q has q in its lowest bits: an OR and a subtraction are cheaper than a conversion where
            # conversions run at a quarter of the rate (CUDA C++ Programming Guide, arithmetic throughput).
            return tirx.reinterpret("float32", code | tirx.const(0x4B000000, "uint32")) - 8388608.0
        return cast("float32", code, 1)

    def place(self, element: int) -> int:
        """The bit of a word from which `value` counts code `element`: x over 2^place makes up for it, exactly."""
        return element * self.spec.bits % 32 if self._stay and isinstance(self.spec, QuantSpec) else 0

    @property
    def _stay(self) -> bool:
        return self.in_place and isinstance(self.spec, QuantSpec) and len(self.spec.layout.planes) == 1


def sum_over_threads(values: list[Expr], tx: Expr, width: int, subgroup: int) -> list[Expr]:
    """Sums of float32 `values` over the `width` threads of threadIdx.x, valid in thread x = 0.

    By shuffles where a subgroup of that size holds the threads (`width` divides `subgroup`), else through
    shared memory. TVM's own shuffled reduction is not used: it ends with a broadcast from lane y * width,
    which on Metal is past the subgroup for y > 0 and gives any value.
    """
    if width == 1:
        return values
    if subgroup and subgroup % width == 0:
        sums = Registers(len(values))
        for i, value in enumerate(values):
            sums[i] = value
        mask, size = tirx.const(0xFFFFFFFF, "uint32"), subgroup
        offset = width // 2
        while offset:  # lane 0 only ever adds lanes below `width`; what the others hold is not used
            for i in range(len(values)):
                shuffled = tirx.call_intrin("float32", "tirx.tvm_warp_shuffle_down", mask, sums[i], offset, size, size)
                sums[i] = sums[i] + shuffled
            offset //= 2
        return [sums[i] for i in range(len(values))]
    results = [T.alloc_buffer((1,), "float32", scope="local") for _ in values]
    left, right = ([tirx.Var(f"{side}{i}", "float32") for i in range(len(values))] for side in "ab")
    zeros = [tirx.const(0, "float32") for _ in values]
    add = tirx.CommReducer(left, right, [a + b for a, b in zip(left, right, strict=True)], zeros)
    none = tirx.reinterpret("handle", tirx.const(0, "uint64"))
    with T.attr(add, "reduce_scope", none):
        count = tirx.const(len(values), "uint32")
        found = [r[0] for r in results]
        T.evaluate(tirx.call_intrin("void", "tirx.tvm_thread_allreduce", count, *values, True, *found, tx))
    return found
