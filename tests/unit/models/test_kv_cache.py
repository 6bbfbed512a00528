"""The KV cache's kernels as exported for GPUs, where TVM's own are unsafe."""

from __future__ import annotations

from dataclasses import replace

import helpers_kernels as hk
import numpy as np
import pytest
from helpers_models import DEMO

from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config
from awq_compile.models.decoder import export_decoder
from awq_compile.models.kv_cache import attention_workspace_bytes
from awq_compile.targets import resolve_target
from awq_compile.verify.executors.simt import SimtExecutor

TARGETS = ("cuda:sm_80", "metal", "opencl", "vulkan", "android:adreno")
MERGE = "tir_attention_merge_state"


@pytest.mark.parametrize("name", TARGETS)
def test_merging_attention_states_does_not_race(name: str) -> None:
    """Runs the exported kernel on threads in any order: TVM's reads the sums while others overwrite them."""
    config, rng = read_config(DEMO), np.random.default_rng(2)
    module, _ = export_decoder(config, CompileOptions(64), "float16", resolve_target(name))
    kernels = [f for var, f in module.functions.items() if var.name_hint.startswith(MERGE)]
    assert len(kernels) == 1
    rows, heads, dim = 5, config.num_heads, config.head_dim
    v, other = (rng.standard_normal((rows, heads, dim)).astype("float16") for _ in range(2))
    s, s_other = (rng.uniform(-6, 6, (rows, heads)).astype("float32") for _ in range(2))
    s_other[2] = -5e4  # where the other saw nothing
    top = np.maximum(s, s_other).astype(np.float64)
    mine, theirs = np.exp2(s - top), np.exp2(s_other - top)
    merged = (v * mine[..., None] + other * theirs[..., None]) / (mine + theirs)[..., None]
    sums = np.log2(mine + theirs) + top
    hk.run(hk.build(kernels[0], "cuda"), SimtExecutor(), MERGE, [v, s, other, s_other])
    np.testing.assert_allclose(v.astype(np.float64), merged, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(s, sums, rtol=1e-5, atol=1e-5)


def test_memory_that_attention_takes_from_the_runtime() -> None:
    """On GPUs that of decoding, for full sequences; TVM's kernels for sliding windows take none, nor do CPUs' any."""
    config, options = read_config(DEMO), CompileOptions(4096, max_batch_size=4)
    # 1024 pages in chunks of 32, or shorter ones in the 264 blocks of two heads; and one more for each sequence.
    slots = 192
    assert slots - 64 < max(1024 // 32, 264 // 2) + 4 <= slots
    of_slot = config.num_heads * (config.head_dim + 4) * 4
    assert attention_workspace_bytes(config, resolve_target("cuda:sm_80"), options) == slots * of_slot
    assert attention_workspace_bytes(config, resolve_target("cpu"), options) == 0
    sliding = replace(options, sliding_window_size=1024)
    assert attention_workspace_bytes(config, resolve_target("cuda:sm_80"), sliding) == 0
