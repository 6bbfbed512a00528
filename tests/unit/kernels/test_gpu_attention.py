"""Decode attention for GPUs against float64 NumPy, as emitted code: chunks of all lengths, odd heads, memory of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest

from awq_compile.errors import CompileError
from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.decode_plan import DecodePlan
from awq_compile.kernels.gpu_attention import paged_decode
from awq_compile.schedules import DecodeAttentionSchedule
from awq_compile.targets import resolve_target
from awq_compile.targets.gpu import GpuTarget
from awq_compile.verify.case import arrays_after, call_arguments, judge
from awq_compile.verify.cases import attention
from awq_compile.verify.executors import opencl
from awq_compile.verify.executors.base import Executor
from awq_compile.verify.executors.opencl import OpenCLExecutor
from awq_compile.verify.executors.simt import SimtExecutor

KINDS = ("cuda", "metal", "opencl")
NAME = "attention_paged_decode"
SHAPES = [
    AttentionShape(14, 2, 64, "float16"),  # 7 query heads for a key head
    AttentionShape(4, 2, 80, "float16", page=32),  # 10 vectors: 2 threads a key, and threads without values
    AttentionShape(3, 3, 96, "float16", page=8),  # no grouping
    AttentionShape(8, 2, 128, "float16"),
    AttentionShape(32, 2, 24, "float16", page=64),  # 16 query heads in two blocks, 3 vectors of 8
    AttentionShape(6, 2, 10, "float32"),  # vectors of 2
]
# Small: chunks of a page up to 64 positions, and everything in more than one turn.
SMALL = DecodeAttentionSchedule(
    threads=64,
    key_threads=4,
    keys=2,
    values=2,
    vector_bytes=16,
    positions=64,
    blocks=24,
    subgroup=32,
    shared_bytes=16 << 10,
)


def schedule_for(kind: str, schedule: DecodeAttentionSchedule) -> DecodeAttentionSchedule:
    """Metal's vectors have four elements; OpenCL promises no shuffles."""
    return replace(
        schedule, vector_bytes=8 if kind == "metal" else 16, subgroup=0 if kind == "opencl" else schedule.subgroup
    )


def executor_for(kind: str) -> Executor:
    if kind != "opencl":
        return SimtExecutor()
    if (reason := opencl.missing()) is not None:
        pytest.skip(reason)
    return OpenCLExecutor(prefer="cpu")


def check(kind: str, shape: AttentionShape, schedule: DecodeAttentionSchedule, batches: Sequence[Any] = ()) -> None:
    """All cases of `verify`, or batches of lengths with so many more pages in the table."""
    built, executor = hk.build(paged_decode(shape, schedule, NAME), kind), executor_for(kind)
    table, rng = built.tables[NAME], np.random.default_rng(3)
    kernel = attention._Kernel.of(table, rng, None)
    cases = attention.paged_decode(table, rng, None)
    for case in [attention._decode(kernel, *batch, spare=spare) for *batch, spare in batches] or cases:
        arguments = call_arguments(table, case)
        launched = hk.run(built, executor, NAME, arguments)
        assert len(launched) == 2
        outcome = judge(case, arrays_after(arguments))
        assert not outcome.reason, f"{case.label}: {outcome.reason}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind: str, shape: AttentionShape) -> None:
    """One sequence and several, an empty one, chunks of a page and of the most, with ragged ends."""
    check(kind, shape, schedule_for(kind, SMALL))


def gpu(name: str) -> GpuTarget:
    target = resolve_target(name)
    assert isinstance(target, GpuTarget)
    return target


@pytest.mark.parametrize("name", ["cuda:sm_90", "metal", "opencl"])
def test_schedules_of_targets(name: str) -> None:
    """What libraries have, one sequence and five, over chunks that fill a block's turns several times."""
    target = gpu(name)
    lengths = [((1,), False, 0), ((1501,), False, 0), ((1, 77, 0, 300, 16), False, 0), ((511, 2), False, 20000)]
    check(str(target.tvm_target["kind"]), AttentionShape(8, 2, 64, "float16"), target.decode_attention, lengths)


@pytest.mark.parametrize(
    "change", [{"keys": 1, "values": 8}, {"keys": 4, "values": 1}, {"key_threads": 1}, {"group": 2}]
)
def test_other_schedules(change: dict[str, int]) -> None:
    """Numbers of loads in flight, keys of one thread each, and query heads in blocks of two."""
    check("cuda", SHAPES[3], replace(SMALL, **change))


@pytest.mark.parametrize("change", [{"sums": 1}, {"sums": 3}, {"shared_bytes": 11 << 10}])
def test_sums_meet_a_few_heads_at_a_time(change: dict[str, int]) -> None:
    """Of seven; the last number has memory for four, or so."""
    check("cuda", SHAPES[0], replace(SMALL, **change), [((70, 3), False, 0)])


def test_shared_memory_bounds_the_heads_of_a_block() -> None:
    """8 query heads of 256 elements are too many for 32 KB, and on CUDA, with longer chunks, for 48 KB."""
    shape = AttentionShape(8, 1, 256, "float16")
    for name, group in (("opencl", 4), ("cuda:sm_90", 4)):
        target = gpu(name)
        plan = DecodePlan.of(shape, target.decode_attention)
        assert plan.group == group
        assert plan.shared_bytes(plan.together) <= target.limits.shared_bytes
    with pytest.raises(CompileError, match=r"takes \d+ bytes of shared memory, and there are 2048"):
        DecodePlan.of(shape, replace(SMALL, shared_bytes=2048))


def test_large_scores() -> None:
    """Scores of thousands of powers of two apart neither overflow nor lose the largest."""
    shape = AttentionShape(2, 1, 16, "float32")
    built, executor = hk.build(paged_decode(shape, SMALL, NAME), "cuda"), SimtExecutor()
    table, rng = built.tables[NAME], np.random.default_rng(4)
    case = attention._decode(attention._Kernel.of(table, rng, None), (200,), False)
    q, pages = (np.asarray(case.arguments[n]) for n in (0, 1))
    q *= 2000
    order, positions = np.asarray(case.arguments[3]), np.arange(200)
    k, v = (pages[order[positions // 16], part, 0, positions % 16].astype(np.float64) for part in (0, 1))
    scores = q[0].astype(np.float64) @ k.T * 16**-0.5 * np.log2(np.e)
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    arguments = call_arguments(table, case)
    hk.run(built, executor, NAME, arguments)
    after = arrays_after(arguments)
    assert np.ptp(scores) > 5000
    np.testing.assert_allclose(after[7][0], weights @ v / weights.sum(1, keepdims=True), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(after[8][0], scores.max(1) + np.log2(weights.sum(1)), rtol=1e-5)


def test_heads_too_large_for_a_block() -> None:
    """A head has at most as many vectors as a block has threads."""
    with pytest.raises(CompileError, match="head_dim 1024 has 128 vectors"):
        paged_decode(AttentionShape(1, 1, 1024, "float16"), SMALL, NAME)


@pytest.mark.parametrize("change", [{"threads": 96}, {"keys": 0}])
def test_illegal_schedules(change: dict[str, int]) -> None:
    """Threads are powers of two, and nothing is zero."""
    with pytest.raises(CompileError, match="illegal"):
        replace(SMALL, **change)
