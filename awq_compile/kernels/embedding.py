"""Rows of an embedding matrix, dequantised as they are read: y[i, h] = W[clip(ids[i]), h]."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import BLOCK, Float16Spec, WeightSpec
from awq_compile.kernels.simd import cast

EMBEDDING_TAG: Final = "awq_compile.embedding"  # function attribute: name of the WeightSpec


def embedding_take(spec: WeightSpec, vocab: int, hidden: int, dtype: str) -> Any:
    """PrimFunc (ids (n,) int32, arrays of W (vocab, hidden), y (n, hidden)); ids are clipped to the vocabulary."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(f"embedding_{spec.name}_v{vocab}_h{hidden}")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, EMBEDDING_TAG: spec.name})
        n = tirx.Var("n", "int64")
        ids = T.arg("ids", T.buffer((n,), "int32"))
        w = {name: T.arg(name, T.buffer(shape, kind)) for name, (shape, kind) in spec.arrays(vocab, hidden).items()}
        y = T.arg("y", T.buffer((n, hidden), dtype))
        with T.serial(0, n) as i:
            row = T.bind(T.max(T.min(ids[i], vocab - 1), 0))
            if isinstance(spec, Float16Spec):
                with T.serial(0, hidden) as h:
                    T.buffer_store(y, cast(dtype, w["weight"][row, h], 1), [i, h])
            else:
                with T.serial(0, hidden // BLOCK) as block:
                    group = block * BLOCK // spec.group
                    scale = T.bind(cast("float32", w["q_scale"][row, group], 1))
                    zero = float(spec.zero) if spec.symmetric else cast("float32", w["q_zero"][row, group], 1)
                    for e in range(BLOCK):
                        words = partial(_word, w["q_weight"], row, block * spec.bits)
                        code = spec.layout.code(words, e)
                        value = (cast("float32", code, 1) - zero) * scale
                        T.buffer_store(
                            y, cast(dtype, value, 1) if dtype != "float32" else value, [i, block * BLOCK + e]
                        )
    return builder.get()


def _word(weight: Any, row: Any, first: Any, index: int) -> Any:
    return weight[row, first + index]
