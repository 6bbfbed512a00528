"""What the sampler's kernels are made of: an open PrimFunc, one-value registers, sums over a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.simt import Registers, barrier

Expr = Any
Buffer = Any

THREADS: Final = 256  # of a block: every device takes as many
PER_THREAD: Final = 8  # elements of a tile
COLUMNS: Final = 8  # of a thread at once: one block has to keep the memory busy
TILE: Final = THREADS * PER_THREAD


def tiles_of(vocab_size: int) -> int:
    """Tiles of a row, of which the last may be partly beyond it."""
    return -(-vocab_size // TILE)


@contextmanager
def function(name: str, arguments: dict[str, tuple[tuple[Any, ...], str]]) -> Iterator[tuple[IRBuilder, list[Buffer]]]:
    """Opens a scheduled PrimFunc; yields its buffers, `arguments` being name → (shape, dtype).

    `builder.get()` is the function, after the block.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        buffers = [T.arg(argument, T.buffer(shape, dtype)) for argument, (shape, dtype) in arguments.items()]
        with T.sblock("root"):  # without one, Relax refuses a function of one input, which might be a reshape
            yield builder, buffers


class Cell:
    """A value of a thread that changes."""

    def __init__(self, value: Any, dtype: str) -> None:
        self._dtype = dtype
        self._register = Registers(1, dtype)
        self.set(value)

    @property
    def value(self) -> Expr:
        """The value where the expression stands."""
        return self._register[0]

    def set(self, value: Any) -> None:
        """Takes a number or an expression."""
        self._register[0] = tirx.const(value, self._dtype) if isinstance(value, int | float) else value


def shared_array(count: int, dtype: str) -> Buffer:
    """Memory that the threads of a block share."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def each_column(vocab_size: int, tx: Expr, body: Callable[[list[Expr]], None]) -> None:
    """Emits `body` for all columns of a row that belong to thread `tx`: those of its number modulo `THREADS`.

    It gets several at once, whose loads should come first, so that they are in flight together.
    """
    at_once = THREADS * COLUMNS
    whole = vocab_size // at_once
    if whole:
        with T.serial(0, whole) as i:
            body([i * at_once + e * THREADS + tx for e in range(COLUMNS)])
    if rest := -(-(vocab_size - whole * at_once) // THREADS):
        with T.serial(0, rest) as i:
            column = T.bind(whole * at_once + i * THREADS + tx)
            with T.If(column < vocab_size), T.Then():
                body([column])


def sum_over_block(shared: Buffer, tx: Expr) -> None:
    """Sums a shared array of `THREADS` float32, always in the same order; its sum is then in element 0.

    Needs no barrier around it, but one before the array is written again.
    """
    offset = THREADS // 2
    while offset:
        barrier()
        with T.If(tx < offset), T.Then():
            T.buffer_store(shared, shared[tx] + shared[tx + offset], [tx])
        offset //= 2
    barrier()
