"""A CUDA library that replays graphs keeps MLC's contract, and its tokens are the CPU library's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_contract import OPTIONS, TINY, write_dist
from helpers_models import write_model

from awq_compile.contract.check import check_contract
from awq_compile.contract.library import read_library
from awq_compile.manifest import open_dist
from awq_compile.models.decoder import DECODE_FUNCTIONS
from awq_compile.targets import resolve_target
from awq_compile.verify.whole_model import Prompts, verify_whole_model

TARGET = "cuda:sm_80"
# KV heads of 1024 elements together: with fewer, TVM's kernel that appends reads positions beyond the last token's.
MODEL = TINY | {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
PROMPTS = Prompts([5, 6, 7, 8, 9], [[10, 11, 12], [13]])


def test_a_library_with_graphs(tmp_path: Path) -> None:
    """Read, compared with the contract, and run kernel by kernel; each replay on what its first run was given."""
    if shutil.which("nvcc") is None:
        pytest.importorskip("cuda.bindings")
    model = write_model(tmp_path / "model", **MODEL)
    folder = write_dist(tmp_path / "dist", model, [TARGET], options=replace(OPTIONS, cuda_graphs=True))
    dist = open_dist(folder)
    assert dist.manifest.options["cuda_graphs"] is True
    assert check_contract(folder) == []
    names = set(read_library(dist.library(TARGET), "cuda").functions())
    assert "cuda_graph_alloc" in names
    for name in DECODE_FUNCTIONS:
        assert any(found.startswith(f"{name}_cuda_graph_capture") for found in names)
    found = verify_whole_model(dist, resolve_target(TARGET), prompts=PROMPTS, steps=3)
    assert found.passed, found.words()
    assert found.tokens == 1 + 3 + 2 + 3 * 2
    for kernel in ("attention_ragged_prefill", "attention_paged_decode"):  # ours, not TVM's
        assert found.launches[f"{kernel}_kernel"] > 0
