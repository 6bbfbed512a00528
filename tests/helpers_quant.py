"""Tiny random Hugging Face checkpoints of every family, with odd sizes, and a tokenizer of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / heads
    "vocab_size": 333,  # not a multiple of 8
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-bias-7to1": (
        "llama",
        {"attention_bias": True, "num_attention_heads": 14, "head_dim": 32, "hidden_size": 224},
    ),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "num_attention_heads": 8}),
}


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A word tokenizer `w0 w1 …` over the whole vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))


def write_text(path: Path, vocab_size: int, tokens: int, seed: int = 0) -> Path:
    """A random text of `tokens` words of that tokenizer."""
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


def make_model(
    path: Path, family: str = "llama3", *, shards: bool = False, dtype: str = "float16", **sizes: Any
) -> Path:
    """Writes a random checkpoint of `family` into `path`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra = FAMILIES[family]
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**BASE, **extra, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 and "norm" in name:  # as trained models: channels of very different size, some negative
                value.copy_(torch.randn_like(value).exp() * torch.where(torch.rand_like(value) < 0.1, -1.0, 1.0))
            elif value.ndim == 1:
                value.normal_(std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size="60KB" if shards else "5GB")
    write_tokenizer(path, config.vocab_size)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; a value of None removes the key."""
    data = json.loads(path.read_text())
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
