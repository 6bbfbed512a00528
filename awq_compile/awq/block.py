"""Decoder layers of transformers, one at a time: the independent implementation that calibration runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from awq_compile.errors import ModelError
from awq_compile.models.config import ModelConfig


def _module(config: ModelConfig) -> Any:
    return importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")


def hf_config(config: ModelConfig, model_dir: Path) -> Any:
    """The transformers configuration, set to full attention: the context never exceeds a sliding window."""
    prefix = config.architecture.hf_name.removesuffix("ForCausalLM")
    module = importlib.import_module(f"transformers.models.{config.model_type}.configuration_{config.model_type}")
    try:
        found = getattr(module, f"{prefix}Config").from_pretrained(model_dir, local_files_only=True)
    except Exception as problem:  # transformers and its strict dataclasses raise many kinds
        raise ModelError(f"{model_dir / 'config.json'}: transformers refuses it: {problem!s:.300}") from None
    found._attn_implementation = "sdpa"
    found.head_dim = config.head_dim
    found.tie_word_embeddings = config.tie_word_embeddings
    return found


def model_class(config: ModelConfig, model_dir: Path) -> tuple[Any, Any]:
    """(…ForCausalLM class, its configuration)."""
    return getattr(_module(config), config.architecture.hf_name), hf_config(config, model_dir)
