"""Rows of an embedding matrix, dequantised as they are read: y[i, h] = W[clip(ids[i]), h]."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.errors import CompileError
from awq_compile.formats import BLOCK, Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.elementwise import every
from awq_compile.kernels.simd import cast

EMBEDDING_TAG: Final = "awq_compile.embedding"  # function attribute: name of the WeightSpec


def embedding_take(spec: WeightSpec, vocab: int, hidden: int, dtype: str, threads: int = 0) -> Any:
    """PrimFunc (ids (n,) int32, arrays of W (vocab, hidden), y (n, hidden)); ids are clipped to the vocabulary.

    W is NK: its rows are what is read. Each step gives 32 elements. `threads` is the size of a block on a GPU,
    0 for a loop on a CPU.
    """
    if isinstance(spec, QuantSpec) and spec.order != "NK":
        raise CompileError(
            f"an embedding reads rows, and {spec.name} does not keep them together: its order must be NK"
        )
    with IRBuilder() as builder, T.prim_func():
        T.func_name(f"embedding_{spec.name}_v{vocab}_h{hidden}")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, EMBEDDING_TAG: spec.name})
        n = tirx.Var("n", "int64")
        ids = T.arg("ids", T.buffer((n,), "int32"))
        w = {name: T.arg(name, T.buffer(shape, kind)) for name, (shape, kind) in spec.arrays(vocab, hidden).items()}
        y = T.arg("y", T.buffer((n, hidden), dtype))
        size = BLOCK if hidden % BLOCK == 0 else 1
        blocks = hidden // size
        with every(n * blocks, threads) as i:
            block = i % blocks
            row = T.bind(T.max(T.min(ids[i // blocks], vocab - 1), 0))
            if isinstance(spec, Float16Spec):
                values = [cast("float32", w["weight"][row, block * size + e], 1) for e in range(size)]
            else:
                group = block * BLOCK // spec.group
                scale = T.bind(cast("float32", w["q_scale"][row, group], 1))
                zero = float(spec.zero) if spec.symmetric else cast("float32", w["q_zero"][row, group], 1)
                words = partial(_word, w["q_weight"], row, block * spec.bits)
                values = [(cast("float32", spec.layout.code(words, e), 1) - zero) * scale for e in range(BLOCK)]
            for e, value in enumerate(values):
                stored = value if dtype == "float32" else cast(dtype, value, 1)
                T.buffer_store(y, stored, [i // blocks, block * size + e])
    return builder.get()


def _word(weight: Any, row: Any, first: Any, index: int) -> Any:
    return weight[row, first + index]
