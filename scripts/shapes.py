"""Configurations of models whose shapes are built without weights: `bench_targets`, `verify_shapes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import awq_compile
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig, read_config

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _shape(base: dict[str, Any], sizes: str, **more: Any) -> dict[str, Any]:
    """config.json from hidden size, intermediate size, layers, heads, KV heads, head size and vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = dict(zip((*names, "head_dim", "vocab_size"), map(int, sizes.split()), strict=True))
    common = {"hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    return {**base, **common, **values, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, **more}


DEMO = "demo"
MODELS = {
    DEMO: json.loads((Path(awq_compile.__file__).parent / "data" / "demo" / "config.json").read_text("utf-8")),
    "llama-1.1b": _shape(_LLAMA, "2048 5632 22 32 4 64 32000"),
    "llama-8b": _shape(
        _LLAMA, "4096 14336 32 32 8 128 128256", rope_scaling={**_ROPE3, "original_max_position_embeddings": 8192}
    ),
    "qwen2-0.5b": _shape(_QWEN2, "896 4864 24 14 2 64 151936", tie_word_embeddings=True),
    "qwen3-0.6b": _shape(_QWEN3, "1024 3072 28 16 8 128 151936", tie_word_embeddings=True),
}


def write_config(model: str, folder: Path) -> ModelConfig:
    """Writes `config.json` of one of `MODELS` into a folder, and reads it."""
    (folder / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
    return read_config(folder)


def options_for(config: ModelConfig) -> CompileOptions:
    """What the libraries are dimensioned for."""
    return CompileOptions(min(8192, config.context_window_size), 512, 8)
