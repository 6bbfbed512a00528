"""Attention of new tokens on tensor cores against float64 NumPy, as emitted code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest

from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.mma_attention import paged_prefill, ragged_prefill, supports
from awq_compile.targets import resolve_target
from awq_compile.targets.gpu import GpuTarget
from awq_compile.verify.case import arrays_after, call_arguments, judge
from awq_compile.verify.cases import attention
from awq_compile.verify.executors.simt import SimtExecutor

SHAPES = [
    AttentionShape(14, 2, 64, "float16"),  # 7 query heads for a key head: a tile begins within a token
    AttentionShape(4, 2, 80, "float16", page=32),  # pieces that not every thread has one of
    AttentionShape(3, 3, 96, "float16", page=8),  # no grouping
    AttentionShape(8, 2, 128, "float16", page=128),
    AttentionShape(2, 1, 256, "float16"),  # smaller tiles of keys
    AttentionShape(34, 1, 16, "float16"),
]
KERNELS: dict[str, tuple[Callable[..., Any], Any]] = {
    "attention_ragged_prefill": (ragged_prefill, attention.tiled_ragged_prefill),
    "attention_paged_prefill": (paged_prefill, attention.tiled_paged_prefill),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(name: str, shape: AttentionShape) -> None:
    """All of `verify`'s: one sequence and several, empty ones, tiles with ragged ends, causal and not."""
    emit, cases = KERNELS[name]
    built, executor = hk.build(emit(shape, name), "cuda"), SimtExecutor()
    table = built.tables[name]
    for case in cases(table, np.random.default_rng(5), None):
        arguments = call_arguments(table, case)
        launched = hk.run(built, executor, name, arguments)
        assert len(launched) == 1
        outcome = judge(case, arrays_after(arguments))
        assert not outcome.reason, f"{case.label}: {outcome.reason}"


def test_large_scores() -> None:
    """Scores thousands of powers of two apart, the largest last: what was summed before counts no more."""
    shape, name = AttentionShape(1, 1, 16, "float16"), "attention_ragged_prefill"
    built, executor = hk.build(ragged_prefill(shape, name), "cuda"), SimtExecutor()
    table, rng = built.tables[name], np.random.default_rng(6)
    case = attention._ragged(attention._Kernel.of(table, rng, None), (70,), (70,), causal=True)
    q, k, v = (np.asarray(case.arguments[n]) for n in (0, 2, 3))
    q *= 200
    k *= np.linspace(0.1, 20, len(k)).astype(np.float16)[:, None, None]
    scores = q[:, 0].astype(np.float64) @ k[:, 0].astype(np.float64).T * 16**-0.5 * np.log2(np.e)
    scores = np.where(np.tri(70, dtype=bool), scores, -np.inf)
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    arguments = call_arguments(table, case)
    hk.run(built, executor, name, arguments)
    after = arrays_after(arguments)
    assert np.ptp(scores[-1]) > 5000
    expected = weights @ v[:, 0].astype(np.float64) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(after[7][:, 0], expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(after[8][:, 0], scores.max(1) + np.log2(weights.sum(1)), rtol=1e-5)


def test_where_it_serves() -> None:
    """float16, whole operands, sums that fit; CUDA from sm_80 on."""
    assert not supports(AttentionShape(2, 1, 64, "float32"))
    assert not supports(AttentionShape(2, 1, 72, "float16"))
    assert not supports(AttentionShape(2, 1, 512, "float16"))
    targets = [
        resolve_target(name) for name in ("cuda:sm_75", "cuda:sm_75+sm_90", "cuda:sm_80", "cuda:sm_100", "vulkan")
    ]
    assert [isinstance(t, GpuTarget) and t.mma_attention for t in targets] == [False, False, True, True, False]
