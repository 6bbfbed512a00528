"""What the MLC runtime asks of a library besides the model: work on logits, and moving rows.

`softmax_with_temperature` returns its result; everything else writes into an argument, so it is a
PrimFunc of the library and no Relax function. Shapes: b sequences, V vocabulary, t tokens, q rows.
"""
# mypy: disable-error-code="untyped-decorator, valid-type, name-defined"

from __future__ import annotations

from typing import Any, Final

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

_LOWEST: Final = -3.4028234663852886e38  # the smallest float32: a masked logit


def softmax_with_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(b, 1, V) logits, (b,) temperatures → probabilities. Temperature 0: 1/count on the maxima, else 0.

    Greedy requests arrive as temperature 0 and are sampled from this distribution.
    """

    def compute(logits: te.Tensor, temperature: te.Tensor) -> te.Tensor:
        b, _, v = logits.shape
        k = te.reduce_axis((0, v), name="k")
        top = te.compute((b,), lambda i: te.max(logits[i, 0, k], axis=k), name="top")
        zero = tirx.const(0, "float32")

        def weight(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            below = logits[i, 0, j] - top[i]
            greedy = tirx.Select(below >= zero, tirx.const(1, "float32"), zero)
            divisor = tirx.Select(temperature[i] > zero, temperature[i], tirx.const(1, "float32"))
            return tirx.Select(temperature[i] > zero, tirx.exp(below / divisor), greedy)

        weights = te.compute((b, v), weight, name="weights")
        r = te.reduce_axis((0, v), name="r")
        total = te.compute((b,), lambda i: te.sum(weights[i, r], axis=r), name="total")
        return te.compute((b, 1, v), lambda i, _, j: weights[i, j] / total[i], name="probabilities")

    return op.tensor_expr_op(compute, "softmax_with_temperature", [logits, temperature])


def _logit_kernels(vocab_size: int) -> dict[str, tirx.PrimFunc]:
    """The three kernels that change logits (b, V) in place."""
    words = (vocab_size + 31) // 32

    @T.prim_func(s_tir=True)
    def apply_logit_bias_inplace(
        var_logits: T.handle, var_pos2seq_id: T.handle, var_token_ids: T.handle, var_logit_bias: T.handle
    ) -> None:
        """logits[pos2seq_id[i], token_ids[i]] += logit_bias[i]"""
        T.func_attr({"global_symbol": "apply_logit_bias_inplace", "tirx.noalias": True})
        b, t = T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (b, vocab_size), "float32")
        pos2seq_id = T.match_buffer(var_pos2seq_id, (t,), "int32")
        token_ids = T.match_buffer(var_token_ids, (t,), "int32")
        logit_bias = T.match_buffer(var_logit_bias, (t,), "float32")
        for i in range(t):
            with T.sblock("bias"):
                v = T.axis.spatial(t, i)
                logits[pos2seq_id[v], token_ids[v]] += logit_bias[v]

    @T.prim_func(s_tir=True)
    def apply_penalty_inplace(
        var_logits: T.handle,
        var_seq_ids: T.handle,
        var_pos2seq_id: T.handle,
        var_token_ids: T.handle,
        var_token_cnt: T.handle,
        var_penalties: T.handle,
    ) -> None:
        """l -= presence + count * frequency; then l *= repetition where l < 0, else l /= repetition"""
        T.func_attr({"global_symbol": "apply_penalty_inplace", "tirx.noalias": True})
        b, q, t = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (b, vocab_size), "float32")
        seq_ids = T.match_buffer(var_seq_ids, (q,), "int32")
        pos2seq_id = T.match_buffer(var_pos2seq_id, (t,), "int32")
        token_ids = T.match_buffer(var_token_ids, (t,), "int32")
        token_cnt = T.match_buffer(var_token_cnt, (t,), "int32")
        penalties = T.match_buffer(var_penalties, (q, 3), "float32")
        for i in range(t):
            with T.sblock("penalty"):
                v = T.axis.spatial(t, i)
                logits[seq_ids[pos2seq_id[v]], token_ids[v]] -= (
                    penalties[pos2seq_id[v], 0] + T.Cast("float32", token_cnt[v]) * penalties[pos2seq_id[v], 1]
                )
                logits[seq_ids[pos2seq_id[v]], token_ids[v]] = T.if_then_else(
                    logits[seq_ids[pos2seq_id[v]], token_ids[v]] < T.float32(0),
                    logits[seq_ids[pos2seq_id[v]], token_ids[v]] * penalties[pos2seq_id[v], 2],
                    logits[seq_ids[pos2seq_id[v]], token_ids[v]] / penalties[pos2seq_id[v], 2],
                )

    @T.prim_func(s_tir=True)
    def apply_bitmask_inplace(var_logits: T.handle, var_seq_ids: T.handle, var_bitmask: T.handle) -> None:
        """In row seq_ids[i], a logit whose bit is clear becomes the smallest float32."""
        T.func_attr({"global_symbol": "apply_bitmask_inplace", "tirx.noalias": True})
        b, q = T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (b, vocab_size), "float32")
        seq_ids = T.match_buffer(var_seq_ids, (q,), "int32")
        bitmask = T.match_buffer(var_bitmask, (b, words), "int32")
        for i, j in T.grid(q, vocab_size):
            with T.sblock("mask"):
                vi, vj = T.axis.remap("SS", [i, j])
                logits[seq_ids[vi], vj] = T.if_then_else(
                    (bitmask[seq_ids[vi], vj // 32] >> (vj % 32)) & 1 == 1,
                    logits[seq_ids[vi], vj],
                    T.float32(_LOWEST),
                )

    return {
        "apply_logit_bias_inplace": apply_logit_bias_inplace,
        "apply_penalty_inplace": apply_penalty_inplace,
        "apply_bitmask_inplace": apply_bitmask_inplace,
    }


def _row_kernels(what: str, width: int, dtype: str) -> dict[str, tirx.PrimFunc]:
    """dst[i] = src[indices[i]] and dst[indices[i]] = src[i], on rows of `width` elements."""
    gather_name, scatter_name = f"gather_{what}", f"scatter_{what}"

    @T.prim_func(s_tir=True)
    def gather(var_src: T.handle, var_indices: T.handle, var_dst: T.handle) -> None:
        T.func_attr({"global_symbol": gather_name, "tirx.noalias": True})
        m, b = T.int32(), T.int32()
        src = T.match_buffer(var_src, (m, width), dtype)
        indices = T.match_buffer(var_indices, (b,), "int32")
        dst = T.match_buffer(var_dst, (b, width), dtype)
        for i, j in T.grid(b, width):
            with T.sblock("gather"):
                vi, vj = T.axis.remap("SS", [i, j])
                dst[vi, vj] = src[indices[vi], vj]

    @T.prim_func(s_tir=True)
    def scatter(var_src: T.handle, var_indices: T.handle, var_dst: T.handle) -> None:
        T.func_attr({"global_symbol": scatter_name, "tirx.noalias": True})
        m, b = T.int32(), T.int32()
        src = T.match_buffer(var_src, (b, width), dtype)
        indices = T.match_buffer(var_indices, (b,), "int32")
        dst = T.match_buffer(var_dst, (m, width), dtype)
        for i, j in T.grid(b, width):
            with T.sblock("scatter"):
                vi, vj = T.axis.remap("SS", [i, j])
                dst[indices[vi], vj] = src[vi, vj]

    return {gather_name: gather, scatter_name: scatter}


def inplace_kernels(vocab_size: int, hidden_size: int, dtype: str) -> dict[str, Any]:
    """Global symbol → PrimFunc, for every function of the library that writes into an argument."""
    return {
        **_logit_kernels(vocab_size),
        **_row_kernels("probs", vocab_size, "float32"),
        **_row_kernels("hidden_states", hidden_size, dtype),
    }
