"""The kernels of TVM's paged KV cache for the demo model's heads, on every device, against NumPy in float64."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest
from tvm.relax.frontend.nn.llm import kv_cache as kernels

from awq_compile.kernels.merge_state import merge_state
from awq_compile.models.config import read_config
from awq_compile.verify.executors.base import Executor, KernelError
from awq_compile.verify.launch_table import View

CONFIG = read_config(Path(str(files("awq_compile") / "data" / "demo")))
HEADS, KV_HEADS, DIM, PAGE = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, 16
RNG = np.random.default_rng(11)
SCALE = DIM**-0.5
Array = np.ndarray[Any, Any]
ROPE = (0, 1.0, 10000.0, SCALE)  # mode 0: already rotated


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float16)


def poison(*shape: int, dtype: str = "float16") -> Array:
    return np.full(shape, np.nan, dtype)


@dataclass(frozen=True)
class Cache:
    """Pages (P, 2, Hkv, 16, D) in scattered order behind `offset` elements, and sequences of some lengths."""

    pages: View
    indptr: Array
    values: Array
    last_page: Array
    lengths: tuple[int, ...]

    @staticmethod
    def make(lengths: tuple[int, ...], offset: int = 0) -> Cache:
        counts = [-(-n // PAGE) for n in lengths]
        shape = (sum(counts) + 2, 2, KV_HEADS, PAGE, DIM)
        base = normal(offset + int(np.prod(shape)))
        values = RNG.permutation(shape[0])[: sum(counts)].astype(np.int32)
        last = np.array([n - (c - 1) * PAGE for n, c in zip(lengths, counts, strict=True)], np.int32)
        return Cache(View(base, offset, shape), np.cumsum([0, *counts]).astype(np.int32), values, last, lengths)

    def keys_and_values(self, sequence: int) -> tuple[Array, Array]:
        """(n, Hkv, D) of one sequence, in float64."""
        pages = self.pages.base[self.pages.offset :].reshape(self.pages.shape)
        mine = pages[self.values[self.indptr[sequence] : self.indptr[sequence + 1]]].astype(np.float64)
        rows = mine.transpose(1, 0, 3, 2, 4).reshape(2, -1, KV_HEADS, DIM)[:, : self.lengths[sequence]]
        return rows[0], rows[1]


def attend(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, Array]:
    """(t, Hq, D) queries at the end of n keys → outputs, and log2 of the sum of exponentials."""
    share = HEADS // KV_HEADS
    scores = np.einsum("thd,nhd->htn", q.astype(np.float64), np.repeat(k, share, 1)) * SCALE
    if causal:
        t, n = scores.shape[1:]
        scores = np.where(np.arange(n) <= np.arange(n - t, n)[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("htn,nhd->thd", weights / total, np.repeat(v, share, 1))
    return out, (np.log2(total) + top / np.log(2))[..., 0].T


def close(found: Array, exact: Array, tolerance: float = 4e-3) -> None:
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("lengths", "new"), [((5,), (5,)), ((20, 33, 7), (1, 17, 7))])
def test_prefill_over_pages_is_causal(
    device: tuple[str, Executor], lengths: tuple[int, ...], new: tuple[int, ...]
) -> None:
    kind, executor = device
    function = kernels._attention_prefill(KV_HEADS, HEADS, DIM, "float16", False, {}, hk.device_target(kind))
    built = hk.build(function.with_attr("global_symbol", "prefill"), kind)
    cache, rows = Cache.make(lengths, offset=2 * PAGE * DIM), sum(new)
    q, out, lse = normal(rows, HEADS, DIM), poison(rows, HEADS, DIM), poison(rows, HEADS, dtype="float32")
    starts = np.cumsum([0, *new]).astype(np.int32)
    offsets, positions = np.zeros(len(new), np.int32), np.zeros(rows, np.int32)
    paged = [cache.pages, cache.indptr, cache.values, cache.last_page]
    hk.run(built, executor, "prefill", [q, starts, *paged, offsets, positions, out, lse, 1, *ROPE])
    for i in range(len(new)):
        mine = slice(starts[i], starts[i + 1])
        exact, exact_lse = attend(q[mine], *cache.keys_and_values(i), causal=True)
        close(out[mine], exact)
        close(lse[mine], exact_lse)


def test_prefill_of_new_tokens_alone(device: tuple[str, Executor]) -> None:
    kind, executor = device
    function = kernels._attention_prefill_ragged(KV_HEADS, HEADS, DIM, DIM, "float16", {}, hk.device_target(kind))
    built = hk.build(function.with_attr("global_symbol", "ragged"), kind)
    starts = np.array([0, 4, 25], np.int32)
    q, k, v = normal(25, HEADS, DIM), normal(25, KV_HEADS, DIM), normal(25, KV_HEADS, DIM)
    out, lse = poison(25, HEADS, DIM), poison(25, HEADS, dtype="float32")
    args = [q, starts, k, v, starts, np.zeros(25, np.int32), np.zeros(2, np.int32), out, lse, 1, *ROPE]
    hk.run(built, executor, "ragged", args)
    for mine in (slice(0, 4), slice(4, 25)):
        exact, exact_lse = attend(q[mine], k[mine].astype(np.float64), v[mine].astype(np.float64), causal=True)
        close(out[mine], exact)
        close(lse[mine], exact_lse)


def test_append_writes_exactly_the_named_rows(device: tuple[str, Executor]) -> None:
    kind, executor = device
    function = kernels._kv_cache_transpose_append(KV_HEADS, DIM, "float16", PAGE)
    built = hk.build(function.with_attr("global_symbol", "append"), kind, "fallback")
    offset, shape = 64, (3, 2, KV_HEADS, PAGE, DIM)
    base = normal(offset + int(np.prod(shape)))
    expected = base.copy()
    k, v, rows = normal(5, KV_HEADS, DIM), normal(5, KV_HEADS, DIM), np.array([0, 47, 16, 15, -1], np.int32)
    pages = expected[offset:].reshape(shape)
    for token, row in enumerate(rows[:4]):
        pages[row // PAGE, 0, :, row % PAGE], pages[row // PAGE, 1, :, row % PAGE] = k[token], v[token]
    hk.run(built, executor, "append", [View(base, offset, shape), k, v, rows])
    np.testing.assert_array_equal(base, expected)


def test_merging_two_attention_states(device: tuple[str, Executor]) -> None:
    """TVM's kernel has every thread of a head read the sums and then write them: the shim reports that race.

    Ours, which the libraries carry, is right everywhere.
    """
    kind, executor = device
    k, v, q = normal(30, KV_HEADS, DIM), normal(30, KV_HEADS, DIM), normal(3, HEADS, DIM)
    args: list[Array] = []
    for cut in (slice(0, 11), slice(11, 30)):
        out, lse = attend(q, k[cut].astype(np.float64), v[cut].astype(np.float64), causal=False)
        args += [out.astype(np.float16), lse.astype(np.float32)]
    if kind != "opencl":
        racy = kernels._merge_state_inplace(HEADS, DIM, "float16", hk.device_target(kind))
        with pytest.raises(KernelError, match="merge_kernel races"):
            hk.run(
                hk.build(racy.with_attr("global_symbol", "merge"), kind), executor, "merge", [a.copy() for a in args]
            )
    ours = merge_state(HEADS, DIM, "float16", 256).with_attr("global_symbol", "merge")
    hk.run(hk.build(ours, kind), executor, "merge", args)
    exact, exact_lse = attend(q, k.astype(np.float64), v.astype(np.float64), causal=False)
    close(args[0], exact)
    close(args[1], exact_lse)
