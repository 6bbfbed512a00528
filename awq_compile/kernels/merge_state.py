"""Merges two attention results on a GPU, in place.

    s = max(S, S'),  w = 2^(S-s),  w' = 2^(S'-s)
    V ← (V w + V' w') / (w + w')        S ← log2(w + w') + s

V, V' are (N, H, D), S, S' the base-2 logarithms of their softmax sums, (N, H). Takes the place of TVM's
kernel of the same arguments, in which all threads of a row read S and then write it without a barrier:
where a row spans two subgroups, the second reads what the first wrote.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

_VECTOR = 4  # elements of a thread


def merge_state(num_heads: int, head_dim: int, dtype: str, max_threads: int) -> Any:
    """The PrimFunc, scheduled: a thread per 4 elements of a row, as many rows in a block as `max_threads` allows."""
    threads = head_dim // _VECTOR
    rows = max(r for r in range(1, num_heads + 1) if num_heads % r == 0 and (r == 1 or r * threads <= max_threads))

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def merge_state_inplace(v: T.handle, s: T.handle, v_other: T.handle, s_other: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int32()
        V = T.match_buffer(v, (n, num_heads, head_dim), dtype)
        S = T.match_buffer(s, (n, num_heads), "float32")
        V_other = T.match_buffer(v_other, (n, num_heads, head_dim), dtype)
        S_other = T.match_buffer(s_other, (n, num_heads), "float32")
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for by in T.thread_binding(num_heads // rows, thread="blockIdx.y"):
                for ty in T.thread_binding(rows, thread="threadIdx.y"):
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("merge"):
                            h = T.meta_var(by * rows + ty)
                            top = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            mine = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            other = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            top[0] = T.max(S[bx, h], S_other[bx, h])
                            mine[0] = T.exp2(S[bx, h] - top[0])
                            other[0] = T.exp2(S_other[bx, h] - top[0])
                            T.tvm_storage_sync("shared")  # S has been read by the whole row
                            if tx == 0:
                                S[bx, h] = T.log2(mine[0] + other[0]) + top[0]
                            for i in T.vectorized(_VECTOR):
                                V[bx, h, tx * _VECTOR + i] = T.Cast(
                                    dtype,
                                    (
                                        T.Cast("float32", V[bx, h, tx * _VECTOR + i]) * mine[0]
                                        + T.Cast("float32", V_other[bx, h, tx * _VECTOR + i]) * other[0]
                                    )
                                    / (mine[0] + other[0]),
                                )

    return merge_state_inplace.with_attr("global_symbol", "tir_attention_merge_state")
