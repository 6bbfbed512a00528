"""A checkpoint of each family, through the command line, computes what transformers computes on its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import write_model

from awq_compile.awq.checkpoint import open_checkpoint
from awq_compile.cli.main import main
from awq_compile.evaluate import dequantized_model, torch_logits
from awq_compile.runtime.engine import Engine

TOLERANCE = 2e-3  # of a float32 logit
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("w4g128", {"vocab_size": 4101, "tie_word_embeddings": False}),
    "llama3-rope-heads-not-hidden": (
        "w3g32a",
        {
            "rope_scaling": LLAMA3,
            "head_dim": 32,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 288,
        },
    ),
    "mistral": ("w8g64", {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 96}),
    # the proportions of Qwen2-0.5B: seven query heads to a KV head, tied embeddings, biases on q, k, v
    "qwen2-7-to-1": (
        "w4g32-h8",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 224,
            "intermediate_size": 320,
            "vocab_size": 4099,
        },
    ),
    "qwen3": (
        "w4g64a-h4",
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 96, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_end_to_end(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits of every position within 2e-3, and 64 greedy tokens the same."""
    scheme, changed = FAMILIES[family]
    model = write_model(tmp_path / "model", **changed)
    out = tmp_path / "dist"
    words = [str(model), "--scheme", scheme, "-o", str(out), "--calib-samples", "4", "--calib-length", "64", "--json"]
    words += ["--prefill-chunk-size", "40"]
    assert main(words) == 0, capsys.readouterr().err
    checkpoint = open_checkpoint(Path(json.loads(capsys.readouterr().out)["checkpoint"]))
    reference = dequantized_model(checkpoint)
    engine = Engine(out)
    tokens = np.random.default_rng(5).integers(0, checkpoint.config.vocab_size, 90)
    expected = torch_logits(reference)(tokens)
    assert np.abs(engine.logits(tokens) - expected).max() < TOLERANCE

    prompt = tokens[:30].tolist()
    with torch.inference_mode():
        whole = reference.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    greedy = whole[0, 30:].tolist()
    found = list(engine.generate(prompt, max_tokens=64, temperature=0.0, stop_ids=()))
    if found != greedy:  # a tie within the tolerance may fall either way; what follows it then differs
        at = next(i for i, (a, b) in enumerate(zip(found, greedy, strict=True)) if a != b)
        top = np.sort(torch_logits(reference)(np.array(prompt + greedy[:at]))[-1])[-2:]
        assert top[1] - top[0] <= 2 * TOLERANCE, f"token {at} differs: {found[at]} and {greedy[at]}"
