"""Keeps the most probable elements of each row, as many as reach top_p of its sum, on a GPU.

    S(t) = sum of p[j] ≥ t        t: the largest with S(t) ≥ top_p S(0)        p[j] ← p[j] / S(t) where p[j] ≥ t, else 0

Elements as probable as the last one stay. Non-negative floats are ordered like their bits, so t is found to the last
bit by eight rounds over its hexadecimal digits. S is float32 and taken in the same order for every t, which makes it
monotonous. top_p ≥ 1 keeps everything.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.sampler.block import THREADS, Cell, function, shared_array, sum_over_block
from awq_compile.kernels.simt import Registers, barrier

_DIGITS: Final = 16
_LOADS: Final = 4  # in flight at a time
_MORE: Final = 3e38  # than any row sums to


def renormalize_top_p(name: str, vocab_size: int) -> Any:
    """The PrimFunc `name(probs (b, V), top_p (b,), renormalized (b, V))`, all float32. A row of zeros stays."""
    b, v = tirx.Var("b", "int32"), vocab_size
    shapes = {"probs": (b, v), "top_p": (b,), "renormalized": (b, v)}
    with function(name, {n: (shape, "float32") for n, shape in shapes.items()}) as (builder, buffers):
        probs, top_p, result = buffers
        with T.launch_thread("blockIdx.x", b) as row, T.launch_thread("threadIdx.x", THREADS) as tx:
            shared = [shared_array(THREADS, "float32") for _ in range(_DIGITS)]
            least, goal, kept = Cell(0, "uint32"), Cell(0.0, "float32"), Cell(0.0, "float32")
            sums, loaded = Registers(_DIGITS), Registers(_LOADS)
            with T.serial(0, 8) as i:
                shift = T.bind(tirx.Cast("uint32", 28 - 4 * i))
                for digit in range(_DIGITS):
                    sums[digit] = tirx.const(0, "float32")
                with T.serial(0, -(-v // (THREADS * _LOADS))) as j:
                    for e in range(_LOADS):
                        at = (j * _LOADS + e) * THREADS + tx
                        loaded[e] = tirx.const(0, "float32")
                        with T.If(at < v), T.Then():
                            loaded[e] = probs[row, at]
                    for e in range(_LOADS):
                        bits = tirx.reinterpret("uint32", loaded[e])
                        for digit in range(_DIGITS):
                            reached = bits >= least.value + (tirx.const(digit, "uint32") << shift)
                            sums[digit] = sums[digit] + tirx.Select(reached, loaded[e], tirx.const(0, "float32"))
                barrier()  # the sums of the round before have been read
                for digit in range(_DIGITS):
                    T.buffer_store(shared[digit], sums[digit], [tx])
                sum_over_block(shared, tx)
                kept.set(shared[0][0])
                with T.If(i == 0), T.Then():
                    goal.set(tirx.Select(top_p[row] < 1.0, top_p[row] * kept.value, tirx.const(_MORE, "float32")))
                best, found = Cell(0, "int32"), Cell(0.0, "float32")
                for digit in range(1, _DIGITS):
                    found.set(shared[digit][0])
                    with T.If(found.value >= goal.value), T.Then():
                        best.set(digit)
                        kept.set(found.value)
                least.set(least.value + (tirx.Cast("uint32", best.value) << shift))
            with T.serial(0, -(-v // THREADS)) as j:
                at = T.bind(j * THREADS + tx)
                with T.If(at < v), T.Then():
                    own = Cell(probs[row, at], "float32")
                    share = Cell(0.0, "float32")
                    with T.If(tirx.reinterpret("uint32", own.value) >= least.value), T.Then():
                        share.set(own.value / kept.value)
                    T.buffer_store(result, share.value, [row, at])
    return builder.get()
