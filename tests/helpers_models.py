"""Small Hugging Face model directories with random weights, written without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import awq_compile
from awq_compile.models.config import read_config
from awq_compile.models.weights import expected_tensors

DEMO = Path(awq_compile.__file__).parent / "data" / "demo"


def write_model(folder: Path, **changed: Any) -> Path:
    """A Llama of two layers with the demo model's tokenizer; `changed` are keys of its config.json."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config |= changed
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    random = np.random.default_rng(7)
    tensors = {}
    for name, shape in expected_tensors(read_config(folder)):
        value = random.normal(0, 0.05, shape) if len(shape) == 2 else np.ones(shape)
        tensors[name] = value.astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    return folder
