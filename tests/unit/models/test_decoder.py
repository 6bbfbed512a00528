"""The decoder against transformers: the same random weights must give the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import tvm
from helpers_build import ANY_SCHEME, Float, save_hf_config
from tvm_ffi import Shape

from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.models.decoder import export_decoder
from awq_compile.models.parameters import model_parameters
from awq_compile.targets import resolve_target

TOLERANCE = 5e-5  # float32 on both sides; issue 2 allows 2e-3
SIZES = CompileOptions(context_window_size=256, prefill_chunk_size=32, max_batch_size=4)
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.1}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Vocabulary not a multiple of 8, head_dim (24) other than hidden/heads (16), untied.
    "llama2": (
        "Llama",
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"head_dim": 24, "vocab_size": 101},
    ),
    # llama3 rotary scaling, biases everywhere, tied.
    "llama3": (
        "Llama",
        {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3}
        | {"vocab_size": 77, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "attention_bias": True},
    ),
    # One KV head.
    "mistral": (
        "Mistral",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"vocab_size": 131, "head_dim": 32, "sliding_window": None},
    ),
    # 14 heads on 2 KV heads, biases on q, k and v, tied.
    "qwen2": (
        "Qwen2",
        {"hidden_size": 112, "intermediate_size": 48, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"vocab_size": 103, "tie_word_embeddings": True},
    ),
    # Norms on q and k, no grouping.
    "qwen3": (
        "Qwen3",
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"vocab_size": 99, "head_dim": 64},
    ),
}


@dataclass
class Pair:
    """The same weights in transformers and compiled."""

    hf: Any
    config: ModelConfig
    ours: Float

    def reference(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V) logits of a sequence."""
        with torch.no_grad():
            return self.hf(torch.tensor([list(tokens)])).logits[0].float().numpy()

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count).tolist()


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, sizes = FAMILIES[request.param]
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{name}Config")(**SMALL, **sizes)
    hf = getattr(transformers, f"{name}ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:  # norm weights start at one and biases at zero, which would hide mistakes
                parameter += 0.2 * torch.randn_like(parameter)
    config = save_hf_config(hf_config, tmp_path_factory.mktemp(request.param), f"{name}ForCausalLM")
    return Pair(hf, config, Float(config, hf.state_dict(), SIZES))


@pytest.fixture(autouse=True)
def empty_cache(request: pytest.FixtureRequest) -> None:
    if "pair" in request.fixturenames:
        request.getfixturevalue("pair").ours.state("clear")


def close(ours: np.ndarray, reference: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE)


def test_parameters_are_those_of_the_table(pair: Pair) -> None:
    """Names, order and shapes of the exported parameters are model_parameters', in every function that has any."""
    module, names = export_decoder(pair.config, SIZES, "float32")
    expected = model_parameters(pair.config, ANY_SCHEME)
    assert names == [parameter.name for parameter in expected]
    with_weights = [
        f for f in module.functions.values() if isinstance(f, tvm.relax.Function) and "num_input" in f.attrs
    ]
    assert len(with_weights) == 12
    for function in with_weights:
        weights = function.params[function.attrs["num_input"] :]
        assert [weight.name for weight in weights] == names
        assert [tuple(map(int, weight.ty.shape)) for weight in weights] == [p.shape for p in expected]


@pytest.mark.parametrize("name", ["cuda:sm_90", "opencl", "vulkan", "metal"])
def test_gpu_export_computes_in_float16_and_returns_float32(tmp_path: Path, name: str) -> None:
    """The same decoder exports for GPUs: hidden states in float16, logits in float32."""
    config = save_hf_config(transformers.Qwen3Config(**SMALL, **FAMILIES["qwen3"][1]), tmp_path, "Qwen3ForCausalLM")
    module, _ = export_decoder(config, SIZES, "float16", resolve_target(name))
    for function in ("prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"):
        assert module[function].ty.ret.fields[0].dtype == "float32"
        assert module[f"{function}_to_last_hidden_states"].ty.ret.fields[0].dtype == "float16"
    assert module["get_logits"].ty.ret.dtype == "float32"


def test_prefill_and_decode(pair: Pair) -> None:
    """Last-position logits of a prompt, then of each token decoded behind it, across page borders."""
    tokens = pair.tokens(40)
    reference = pair.reference(tokens)
    pair.ours.state("add_sequence", 0)
    close(pair.ours("prefill", {0: tokens[:30]})[0], reference[29:30])
    for i in range(30, 40):
        close(pair.ours("decode", {0: tokens[i : i + 1]})[0], reference[i : i + 1])


def test_prompt_in_chunks(pair: Pair) -> None:
    """A prompt longer than the chunk size comes in pieces, each attending to those before."""
    tokens = pair.tokens(75)
    reference = pair.reference(tokens)
    pair.ours.state("add_sequence", 0)
    for begin, end in ((0, 32), (32, 64), (64, 75)):
        close(pair.ours("prefill", {0: tokens[begin:end]})[0], reference[end - 1 : end])


def test_batch_prefill_and_batch_decode(pair: Pair) -> None:
    """Sequences of different lengths in one call; logits only where asked; then one token each; mixed at last."""
    prompts = {i: pair.tokens(n, seed=i) for i, n in ((0, 3), (1, 17), (2, 1))}
    follow = {i: pair.tokens(3, seed=10 + i) for i in prompts}
    references = {i: pair.reference(prompts[i] + follow[i]) for i in prompts}
    for i in prompts:
        pair.ours.state("add_sequence", i)
    got = pair.ours("batch_prefill", prompts, positions=[2, 19, 20])
    close(got[0], np.stack([references[i][len(prompts[i]) - 1] for i in prompts]))
    got = pair.ours("batch_decode", {i: follow[i][:1] for i in prompts})
    close(got[:, 0], np.stack([references[i][len(prompts[i])] for i in prompts]))
    got = pair.ours("batch_prefill", {0: follow[0][1:3], 2: follow[2][1:2]}, positions=[1, 2])
    close(got[0], np.stack([references[0][5], references[2][2]]))


def test_batch_verify_gives_every_position(pair: Pair) -> None:
    """Logits of all positions of two sequences, one of them already begun."""
    first, second = pair.tokens(20, seed=1), pair.tokens(7, seed=2)
    for i in (0, 1):
        pair.ours.state("add_sequence", i)
    pair.ours("prefill", {0: first[:9]})
    got = pair.ours("batch_verify", {0: first[9:], 1: second})
    close(got[0], np.concatenate([pair.reference(first)[9:], pair.reference(second)]))


def test_popping_and_forking_the_cache(pair: Pair) -> None:
    """Tokens taken back leave no trace; a fork shares its prefix and then goes its own way."""
    tokens, other = pair.tokens(30, seed=3), pair.tokens(5, seed=4)
    pair.ours.state("add_sequence", 0)
    pair.ours("prefill", {0: tokens[:30]})
    pair.ours.state("popn", 0, 9)
    close(pair.ours("prefill", {0: other})[0], pair.reference(tokens[:21] + other)[-1:])
    pair.ours.state("fork_sequence", 0, 1, 19)
    got = pair.ours("batch_decode", {0: [1], 1: [2]})
    expected = [pair.reference([*tokens[:21], *other, 1])[-1], pair.reference([*tokens[:19], 2])[-1]]
    close(got[:, 0], np.stack(expected))


def test_hidden_states_and_their_logits(pair: Pair) -> None:
    """get_logits of the selected last hidden states are the logits, for all five forward functions."""
    tokens = pair.tokens(6, seed=5)
    reference = pair.reference(tokens)
    vm, tensor = pair.ours.vm, tvm.runtime.tensor

    def logits(hidden: np.ndarray) -> np.ndarray:
        return vm["get_logits"](tensor(np.ascontiguousarray(hidden)), pair.ours.params).numpy()

    for name in ("prefill", "batch_prefill", "batch_verify"):
        pair.ours.state("clear")
        pair.ours.state("add_sequence", 0)
        hidden = pair.ours(f"{name}_to_last_hidden_states", {0: tokens[:4]})
        close(logits(hidden[0]), reference[:4])
    picked = vm["batch_select_last_hidden_states"](tensor(hidden[0]), tensor(np.array([3, 0], np.int32)))
    close(logits(picked.numpy()), reference[[3, 0]])
    close(logits(pair.ours("decode_to_last_hidden_states", {0: tokens[4:5]})[0]), reference[4:5])
    close(logits(pair.ours("batch_decode_to_last_hidden_states", {0: tokens[5:]})[0]), reference[5:])


def test_token_tree(pair: Pair) -> None:
    """Drafts that branch: each node's logits are those of its own path; a committed path goes on as a sequence."""
    prompt = pair.tokens(9, seed=6)
    nodes, parents = [5, 7, 11, 13], [-1, 0, 0, 1]  # 5 → 7 → 13, and 5 → 11
    pair.ours.state("add_sequence", 0)
    pair.ours("prefill", {0: prompt})
    got = pair.ours("batch_verify", {0: nodes}, tree=parents)
    paths = [[5], [5, 7], [5, 11], [5, 7, 13]]
    close(got[0], np.stack([pair.reference(prompt + path)[-1] for path in paths]))
    commit = tvm.get_global_func("vm.builtin.attention_kv_cache_commit_accepted_token_tree_nodes")
    commit(pair.ours.cache, Shape([0]), Shape([2]))
    close(pair.ours("decode", {0: [3]})[0], pair.reference([*prompt, 5, 11, 3])[-1:])
