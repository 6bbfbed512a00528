"""What the MLC runtime asks of a library besides the model: work on logits, and moving rows.

`softmax_with_temperature` returns its result; everything else writes into an argument, so it is a
PrimFunc of the library and no Relax function. Shapes: b sequences, V vocabulary, t tokens, q rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.elementwise import every

_LOWEST: Final = -3.4028234663852886e38  # the smallest float32: a masked logit


_SOFTMAX: Final = "softmax_with_temperature"


def softmax_name(active: int, vocab_size: int) -> str:
    """Name of the softmax's PrimFunc: it says how many of the rows are tokens, where not all are."""
    return _SOFTMAX if active == vocab_size else f"{_SOFTMAX}_first_{active}_of"  # TVM may number the end


def softmax_active(name: str, vocab_size: int) -> int | None:
    """Rows that are tokens, from the name of a PrimFunc; None where it is another function's."""
    match = re.match(rf"{_SOFTMAX}(?:_first_(\d+)_of)?", name)
    return None if match is None else int(match[1] or vocab_size)


def softmax_with_temperature(logits: Tensor, temperature: Tensor, active: int) -> Tensor:
    """(b, 1, V) logits, (b,) temperatures → probabilities. Temperature 0: 1/count on the maxima, else 0.

    Greedy requests arrive as temperature 0 and are sampled from this distribution. Behind the first `active` logits
    is padding of the vocabulary, which gets 0: MLC's engine stops at a token that its tokenizer does not have.
    """

    def compute(logits: te.Tensor, temperature: te.Tensor) -> te.Tensor:
        b, _, v = logits.shape
        k = te.reduce_axis((0, active), name="k")
        top = te.compute((b,), lambda i: te.max(logits[i, 0, k], axis=k), name="top")
        zero = tirx.const(0, "float32")

        def weight(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            below = logits[i, 0, j] - top[i]
            greedy = tirx.Select(below >= zero, tirx.const(1, "float32"), zero)
            divisor = tirx.Select(temperature[i] > zero, temperature[i], tirx.const(1, "float32"))
            return tirx.Select(temperature[i] > zero, tirx.exp(below / divisor), greedy)

        weights = te.compute((b, active), weight, name="weights")
        r = te.reduce_axis((0, active), name="r")
        total = te.compute((b,), lambda i: te.sum(weights[i, r], axis=r), name="total")

        def probability(i: tirx.Var, _: tirx.Var, j: tirx.Var) -> tirx.Expr:
            inside = weights[i, j] / total[i]
            return inside if active == vocab_size else tirx.if_then_else(j < active, inside, zero)

        return te.compute((b, 1, v), probability, name="probabilities")

    vocab_size = int(logits.shape[-1])
    return op.tensor_expr_op(compute, softmax_name(active, vocab_size), [logits, temperature])


@dataclass(frozen=True)
class _Kernel:
    """A PrimFunc that does `element(i)` for every i below `count`: a loop, or a thread each where `threads` > 0."""

    name: str
    threads: int

    @contextmanager
    def over(self, arguments: dict[str, tuple[tuple[Any, ...], str]], count: Any) -> Iterator[tuple[Any, list[Any]]]:
        """Opens the function; yields i and the buffers of `arguments`, name → (shape, dtype), in order."""
        T.func_name(self.name)
        T.func_attr({"global_symbol": self.name, "tirx.noalias": True, "tirx.is_scheduled": True})
        buffers = [T.arg(name, T.buffer(shape, dtype)) for name, (shape, dtype) in arguments.items()]
        with every(count, self.threads) as i:
            yield i, buffers


def _logit_bias(kernel: _Kernel, vocab_size: int) -> Any:
    """logits[pos2seq_id[i], token_ids[i]] += bias[i]"""
    b, t = tirx.Var("b", "int32"), tirx.Var("t", "int32")
    ids = dict.fromkeys(("pos2seq_id", "token_ids"), ((t,), "int32"))
    arguments = {"logits": ((b, vocab_size), "float32"), **ids, "logit_bias": ((t,), "float32")}
    with IRBuilder() as builder, T.prim_func(), kernel.over(arguments, t) as (i, (logits, rows, tokens, bias)):
        at = [rows[i], tokens[i]]
        T.buffer_store(logits, logits[at[0], at[1]] + bias[i], at)
    return builder.get()


def _penalty(kernel: _Kernel, vocab_size: int) -> Any:
    """l -= presence + count * frequency; then l *= repetition where l < 0, else l /= repetition"""
    b, q, t = (tirx.Var(name, "int32") for name in "bqt")
    ids = dict.fromkeys(("pos2seq_id", "token_ids", "token_cnt"), ((t,), "int32"))
    arguments = {
        "logits": ((b, vocab_size), "float32"),
        "seq_ids": ((q,), "int32"),
        **ids,
        "penalties": ((q, 3), "float32"),
    }
    with IRBuilder() as builder, T.prim_func(), kernel.over(arguments, t) as (i, buffers):
        logits, rows, positions, tokens, counts, penalties = buffers
        row = positions[i]
        at = [rows[row], tokens[i]]
        presence = penalties[row, 0] + tirx.Cast("float32", counts[i]) * penalties[row, 1]
        T.buffer_store(logits, logits[at[0], at[1]] - presence, at)
        value, repetition = logits[at[0], at[1]], penalties[row, 2]
        T.buffer_store(logits, tirx.Select(value < 0.0, value * repetition, value / repetition), at)
    return builder.get()


def _bitmask(kernel: _Kernel, vocab_size: int) -> Any:
    """In row seq_ids[i], a logit whose bit is clear becomes the smallest float32."""
    b, q = tirx.Var("b", "int32"), tirx.Var("q", "int32")
    arguments = {
        "logits": ((b, vocab_size), "float32"),
        "seq_ids": ((q,), "int32"),
        "bitmask": ((b, (vocab_size + 31) // 32), "int32"),
    }
    with IRBuilder() as builder, T.prim_func(), kernel.over(arguments, q * vocab_size) as (i, buffers):
        logits, rows, mask = buffers
        row, token = rows[i // vocab_size], i % vocab_size
        with T.If((mask[row, token // 32] >> (token % 32)) & 1 == 0), T.Then():
            T.buffer_store(logits, tirx.const(_LOWEST, "float32"), [row, token])
    return builder.get()


def _move_rows(kernel: _Kernel, width: int, dtype: str, *, scatter: bool) -> Any:
    """dst[i] = src[indices[i]], or dst[indices[i]] = src[i], on rows of `width` elements."""
    m, b = tirx.Var("m", "int32"), tirx.Var("b", "int32")
    source, target = (b, m) if scatter else (m, b)
    arguments = {
        "src": ((source, width), dtype),
        "indices": ((b,), "int32"),
        "dst": ((target, width), dtype),
    }
    with IRBuilder() as builder, T.prim_func(), kernel.over(arguments, b * width) as (i, (src, indices, dst)):
        row, column = i // width, i % width
        if scatter:
            T.buffer_store(dst, src[row, column], [indices[row], column])
        else:
            T.buffer_store(dst, src[indices[row], column], [row, column])
    return builder.get()


def inplace_kernels(vocab_size: int, hidden_size: int, dtype: str, threads: int = 0) -> dict[str, Any]:
    """Global symbol → PrimFunc, for every function of the library that writes into an argument.

    `threads` is the size of a block on a GPU, 0 for loops on a CPU.
    """
    found = {
        "apply_logit_bias_inplace": _logit_bias(_Kernel("apply_logit_bias_inplace", threads), vocab_size),
        "apply_penalty_inplace": _penalty(_Kernel("apply_penalty_inplace", threads), vocab_size),
        "apply_bitmask_inplace": _bitmask(_Kernel("apply_bitmask_inplace", threads), vocab_size),
    }
    for what, width, kind in (("probs", vocab_size, "float32"), ("hidden_states", hidden_size, dtype)):
        for scatter, verb in ((False, "gather"), (True, "scatter")):
            name = f"{verb}_{what}"
            found[name] = _move_rows(_Kernel(name, threads), width, kind, scatter=scatter)
    return found
