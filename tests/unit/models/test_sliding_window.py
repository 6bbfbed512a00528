"""A window that slides, and pages of other sizes, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import tvm
from helpers_build import Float, save_hf_config

from awq_compile.errors import ArtifactError, UsageError
from awq_compile.limits import CompileOptions

WINDOW = 20
TOLERANCE = 5e-5
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = SIZES | {"vocab_size": 101, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.1}


def model(folder: Path, window: int | None, options: CompileOptions, **changed: int) -> tuple[Any, Float]:
    torch.manual_seed(0)
    sizes = SMALL | changed
    hf_config = transformers.MistralConfig(**sizes, sliding_window=window, attn_implementation="eager")
    hf = transformers.MistralForCausalLM(hf_config).eval()
    ours = save_hf_config(transformers.MistralConfig(**sizes, sliding_window=None), folder, "MistralForCausalLM")
    return hf, Float(ours, hf.state_dict(), options)


def reference(hf: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.tensor([tokens])).logits[0].float().numpy()


def enable(ours: Float, sink: int = 0) -> None:
    ours.state("add_sequence", 0)
    tvm.get_global_func("vm.builtin.attention_kv_cache_enable_sliding_window_for_seq")(ours.cache, 0, WINDOW, sink)


def test_a_window_slides(tmp_path: Path) -> None:
    """Three windows of tokens, one at a time: each sees WINDOW positions before it, and itself."""
    options = CompileOptions(WINDOW, prefill_chunk_size=8, max_batch_size=2, sliding_window_size=WINDOW)
    hf, ours = model(tmp_path, WINDOW + 1, options)
    tokens = np.random.default_rng(0).integers(0, 101, 3 * WINDOW).tolist()
    enable(ours)
    got = [ours("prefill", {0: tokens[:8]})[0, 0]]
    got += [ours("decode", {0: [token]})[0, 0] for token in tokens[8:]]
    np.testing.assert_allclose(np.stack(got), reference(hf, tokens)[7:], rtol=0, atol=TOLERANCE)


def test_first_tokens_stay(tmp_path: Path) -> None:
    """With a sink the sequence is its first tokens and its last: of one layer, those alone give the same logits."""
    sink = 3
    options = CompileOptions(WINDOW, 8, 2, sliding_window_size=WINDOW, attention_sink_size=sink)
    hf, ours = model(tmp_path, None, options, num_hidden_layers=1)
    tokens = np.random.default_rng(1).integers(0, 101, 3 * WINDOW).tolist()
    enable(ours, sink)
    ours("prefill", {0: tokens[:8]})
    for i, token in enumerate(tokens[8:], 8):
        kept = tokens[:i] if i <= WINDOW else tokens[:sink] + tokens[i - (WINDOW - sink) : i]
        expected = reference(hf, [*kept, token])[-1]
        np.testing.assert_allclose(ours("decode", {0: [token]})[0, 0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("page", [8, 64])
def test_pages_of_other_sizes(tmp_path: Path, page: int) -> None:
    """Prompts in chunks, a fork within a page, tokens taken back, and decoding across page borders."""
    hf, ours = model(tmp_path, None, CompileOptions(128, 40, 4, page_size=page))
    tokens, other = (np.random.default_rng(i).integers(0, 101, n).tolist() for i, n in ((2, 70), (3, 9)))
    ours.state("add_sequence", 0)
    for begin, end in ((0, 32), (32, 50)):
        got = ours("prefill", {0: tokens[begin:end]})
    np.testing.assert_allclose(got[0, 0], reference(hf, tokens[:50])[-1], rtol=0, atol=TOLERANCE)
    ours.state("fork_sequence", 0, 1, 43)
    ours.state("popn", 0, 5)
    got = ours("batch_prefill", {0: tokens[45:], 1: other}, positions=[24, 33])
    expected = [reference(hf, tokens)[-1], reference(hf, tokens[:43] + other)[-1]]
    np.testing.assert_allclose(got[0], np.stack(expected), rtol=0, atol=TOLERANCE)
    got = ours("batch_decode", {0: [7], 1: [8]})
    expected = [reference(hf, [*tokens, 7])[-1], reference(hf, [*tokens[:43], *other, 8])[-1]]
    np.testing.assert_allclose(got[:, 0], np.stack(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"page_size": 12}, "page size must be one of"),
        ({"attention_sink_size": 4}, "needs a sliding window"),
        ({"sliding_window_size": 32, "attention_sink_size": 32}, "the window must be larger"),
        ({"sliding_window_size": 16}, "exceeds the sliding window of 16"),
    ],
)
def test_limits_that_do_not_fit_are_refused(changed: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CompileOptions(64, 32, 2, **changed)


@pytest.mark.parametrize("value", ["16", None, True, -1, 12])
def test_a_manifest_is_read_with_suspicion(value: Any) -> None:
    options = {"context_window_size": 64, "prefill_chunk_size": 32, "max_batch_size": 2, "method": "awq"}
    assert CompileOptions.read(options) == CompileOptions(64, 32, 2)
    with pytest.raises(ArtifactError, match=r"page.size"):
        CompileOptions.read(options | {"page_size": value})


def test_options_that_are_set_or_not_are_read() -> None:
    """CUDA graphs: absent in DISTs of before, true or false, and nothing else."""
    options = {"context_window_size": 64, "prefill_chunk_size": 32, "max_batch_size": 2}
    assert CompileOptions.read(options | {"cuda_graphs": True}) == CompileOptions(64, 32, 2, cuda_graphs=True)
    assert not CompileOptions.read(options).cuda_graphs
    for value in (1, None, "true"):
        with pytest.raises(ArtifactError, match=r"cuda_graphs is .*, expected true or false"):
            CompileOptions.read(options | {"cuda_graphs": value})
