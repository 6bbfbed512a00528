"""Work that is independent for every i: a loop on a CPU, a thread each on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import tirx as T

Expr = Any


@contextmanager
def every(count: Expr, threads: int) -> Iterator[Expr]:
    """Emits its block for each i < `count`; `threads` is the size of a block of threads, 0 for a loop."""
    if not threads:
        with T.serial(0, count) as i:
            yield i
        return
    blocks = (count + (threads - 1)) // threads
    with T.launch_thread("blockIdx.x", blocks) as bx, T.launch_thread("threadIdx.x", threads) as tx:
        i = bx * threads + tx
        with T.If(i < count), T.Then():
            yield i
