"""Functions that decode replay their kernels as graphs, which keep addresses and sizes, and give the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from helpers_build import Float, cpu_target
from helpers_models import write_model
from helpers_vulkan import global_functions
from tvm_ffi import Shape

from awq_compile.compiler import lower_passes, plan_passes, with_bounds
from awq_compile.errors import CompileError
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.decoder import DECODE_FUNCTIONS, export_decoder
from awq_compile.models.weights import expected_tensors
from awq_compile.passes.base import relax_functions
from awq_compile.passes.capture_graphs import captured_kernels, check_captured
from awq_compile.verify.graph_replay import GraphReplay

SIZES = CompileOptions(context_window_size=64, prefill_chunk_size=32, max_batch_size=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    small = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 101}
    return read_config(write_model(tmp_path_factory.mktemp("models") / "tiny", **small))


@pytest.fixture(scope="module")
def planned(config: ModelConfig) -> Any:
    """The decoder on planned memory."""
    module, _ = export_decoder(config, SIZES, "float32")
    with cpu_target():
        return tvm.transform.Sequential([*lower_passes(), *plan_passes(DECODE_FUNCTIONS)])(with_bounds(module, SIZES))


def test_what_decodes_is_captured_and_nothing_else(planned: Any) -> None:
    """Of every layer all kernels behind attention, up to the next one; the functions share one allocation."""
    functions = {str(var.name_hint): function.script() for var, function in relax_functions(planned)}
    assert {name for name, text in functions.items() if "run_or_capture" in text} == set(DECODE_FUNCTIONS)
    assert {name for name, text in functions.items() if "get_cached_alloc" in text} == set(DECODE_FUNCTIONS)
    assert "cuda_graph_alloc" in functions
    for name in DECODE_FUNCTIONS:
        # Before, between and behind the attention of two layers; the first residual is the function's argument.
        assert functions[name].count("run_or_capture") == 4
        assert functions[name].count("attention_with_fused_qkv") == 2
    assert not any("attention_with_fused_qkv" in text for name, text in functions.items() if "_capture" in name)


@pytest.fixture(scope="module")
def both(config: ModelConfig) -> Iterator[tuple[Float, Float, GraphReplay]]:
    """The same weights without and with graphs."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) * 0.1 for name, shape in expected_tensors(config)}
    replay = GraphReplay()
    with global_functions(replay.functions()):
        yield Float(config, state, SIZES), Float(config, state, SIZES, DECODE_FUNCTIONS), replay


def test_replays_give_the_same_logits(both: tuple[Float, Float, GraphReplay]) -> None:
    """Steps of one sequence and of several, whose number comes back: a replay of another step's graph would show."""
    plain, graphs, replay = both
    tokens = np.random.default_rng(0).integers(0, 101, 60).tolist()
    for model in (plain, graphs):
        model.state("clear")
        for sequence in range(3):
            model.state("add_sequence", sequence)
            model("prefill", {sequence: tokens[7 * sequence : 7 * sequence + 5 + sequence]})
    for step, batch in enumerate((1, 3, 1, 2, 3, 2, 1)):
        new = {sequence: [tokens[20 + 3 * step + sequence]] for sequence in range(batch)}
        name = "decode" if batch == 1 else "batch_decode"
        np.testing.assert_array_equal(graphs(name, new), plain(name, new))
    assert sorted({key[1:] for key in replay.recorded}) == [(), (2,), (3,)]


def test_logits_stay_when_the_next_step_runs(both: tuple[Float, Float, GraphReplay]) -> None:
    """A result is not in the memory that graphs share."""
    _, graphs, _ = both
    graphs.state("clear")
    graphs.state("add_sequence", 0)
    graphs("prefill", {0: [1, 2, 3]})
    results = []
    for token in (4, 5):
        graphs.state("begin_forward", Shape([0]), Shape([1]))
        embeds = tvm.runtime.tensor(graphs.embed([token])[None])
        results.append((found := graphs.vm["decode"](embeds, graphs.cache, graphs.params)[0], found.numpy().copy()))
        graphs.state("end_forward")
    assert np.abs(results[0][1] - results[1][1]).max() > 0.01
    for found, expected in results:
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_workspace_is_refused(planned: Any) -> None:
    """The runtime moves workspaces; a graph would write where one has been."""
    kernels = sorted({kernel for _, kernel in captured_kernels(planned)})
    assert len(kernels) >= 4
    launch = ["launch", {"kernel": "k", "buffers": [], "scalars": [], "grid": [1, 1, 1], "block": [1, 1, 1]}]
    tables: dict[str, Any] = {kernel: {"body": [launch]} for kernel in kernels}
    check_captured(planned, tables)
    branch = [["alloc", "work", "float32", [["var", "n"]]], launch]
    tables[kernels[0]] = {"body": [["if", ["lt", ["var", "n"], 9], [launch], branch]]}
    with pytest.raises(CompileError, match="needs a workspace"):
        check_captured(planned, tables)
