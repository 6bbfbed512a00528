"""Accepts or rejects the tokens of draft trees, on a GPU: speculative sampling, Leviathan et al., arXiv 2211.17192.

Nodes are tokens; a node's row of the draft's q drew its token, and its row p of the model follows it. From the root on,
with u uniform, child c of a node and x its token:

    p[x] ≥ u q_c[x]: go on from c        else p ← max(p - q_c, 0) / sum, and on to the next sibling

Where the sum is below 1e-7, p and q are the same but for rounding, and c is accepted. `parents` holds each tree's root,
and afterwards the node reached, from whose row of p the next token is to be drawn. A thread owns the columns of p of
its number modulo the block's threads, and no other touches them: so p needs no order but the thread's own.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.sampler.block import (
    COLUMNS,
    THREADS,
    Cell,
    each_column,
    function,
    shared_array,
    sum_over_block,
)
from awq_compile.kernels.simt import Registers, barrier

_SAME: Final = 1e-7


def verify_drafts(name: str, vocab_size: int) -> Any:
    """The PrimFunc, on m nodes in all trees and b trees; int32 but for float32 q, p and u; -1 is no node.

    `name(q (m, V), tokens (m,), p (m, V), first_child (m,), next_sibling (m,), u (m,), parents (b,))`; p and
    parents change.
    """
    m, b, v = tirx.Var("m", "int32"), tirx.Var("b", "int32"), vocab_size
    arguments = {
        "draft_probs": ((m, v), "float32"),
        "draft_tokens": ((m,), "int32"),
        "model_probs": ((m, v), "float32"),
        "first_child": ((m,), "int32"),
        "next_sibling": ((m,), "int32"),
        "uniform": ((m,), "float32"),
        "parents": ((b,), "int32"),
    }
    with (
        function(name, arguments) as (builder, (q, tokens, p, first_child, next_sibling, uniform, parents)),
        T.launch_thread("blockIdx.x", b) as tree,
        T.launch_thread("threadIdx.x", THREADS) as tx,
    ):
        root, accepted = shared_array(1, "int32"), shared_array(1, "int32")
        shared = shared_array(THREADS, "float32")
        with T.If(tx == 0), T.Then():
            T.buffer_store(root, parents[tree], [0])
        barrier()
        node = Cell(root[0], "int32")
        child = Cell(first_child[node.value], "int32")
        rest, goes_on = Cell(0.0, "float32"), Cell(0, "int32")

        left = Registers(COLUMNS)

        def load_left(columns: list[Any]) -> None:
            for e, column in enumerate(columns):
                left[e] = p[node.value, column] - q[child.value, column]
            for e in range(len(columns)):
                left[e] = T.max(left[e], tirx.const(0, "float32"))

        def add_left(columns: list[Any]) -> None:
            load_left(columns)
            for e in range(len(columns)):
                rest.set(rest.value + left[e])

        def store_left(columns: list[Any]) -> None:
            load_left(columns)
            for e, column in enumerate(columns):
                T.buffer_store(p, left[e] / rest.value, [node.value, column])

        with T.serial(0, m):  # no node is visited twice: a broken tree ends too
            with T.If(child.value >= 0), T.Then():
                x = T.bind(tokens[child.value])
                with T.If(x % THREADS == tx), T.Then():
                    reaches = p[node.value, x] >= uniform[child.value] * q[child.value, x]
                    T.buffer_store(accepted, tirx.Cast("int32", reaches), [0])
            barrier()
            goes_on.set(accepted[0])
            rest.set(0.0)
            with T.If(tirx.all(child.value >= 0, goes_on.value == 0)), T.Then():
                each_column(v, tx, add_left)
            T.buffer_store(shared, rest.value, [tx])
            sum_over_block(shared, tx)
            rest.set(shared[0])
            with T.If(child.value >= 0), T.Then(), T.If(tirx.any(goes_on.value != 0, rest.value < _SAME)):
                with T.Then():
                    node.set(child.value)
                    child.set(first_child[node.value])
                with T.Else():
                    each_column(v, tx, store_left)
                    child.set(next_sibling[child.value])
            barrier()  # what is shared has been read
        with T.If(tx == 0), T.Then():
            T.buffer_store(parents, node.value, [tree])
    return builder.get()
