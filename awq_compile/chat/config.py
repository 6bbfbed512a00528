"""mlc-chat-config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from awq_compile.errors import ModelError
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.manifest import dump_json
from awq_compile.models.config import ModelConfig


def chat_config(
    config: ModelConfig,
    scheme: QuantScheme,
    options: CompileOptions,
    *,
    tokenizer_dir: Path,
    tokenizer_files: list[str],
) -> str:
    """mlc-chat-config.json: the keys that MLC's C++ engine, JSON FFI and Python engine read.

    `conv_template` is plain continuation: the prompt reaches the model as it is.
    """
    generation = _generation_defaults(tokenizer_dir)
    sizes = {
        **options.runtime_keys(),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
    }
    model_config = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "position_embedding_base": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        **sizes,
    }
    plain = {
        "name": "plain",
        "system_template": "{system_message}",
        "system_message": "",
        "system_prefix_token_ids": _prefix_tokens(tokenizer_dir / "tokenizer.json"),
        "add_role_after_system_message": True,
        "roles": {"user": "", "assistant": ""},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
        "messages": [],
        "seps": [""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": list(config.eos_token_ids),
        "function_string": "",
        "use_function_calling": False,
    }
    eos: Any = list(config.eos_token_ids)
    return dump_json(
        {
            "version": "0.1.0",
            "model_type": config.model_type,
            "quantization": scheme.mlc_name,
            "model_config": model_config,
            "vocab_size": config.vocab_size,
            **sizes,
            **generation,
            "conv_template": plain,
            "tokenizer_files": tokenizer_files,
            "pad_token_id": 0,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
        }
    )


def _prefix_tokens(tokenizer_json: Path) -> list[int]:
    """Tokens that the tokenizer puts before a text of its own accord (a begin token, or none)."""
    from tokenizers import Tokenizer

    try:
        encoding = Tokenizer.from_file(str(tokenizer_json)).encode("", add_special_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{tokenizer_json} cannot be read: {error}") from None
    return list(encoding.ids)


def _generation_defaults(folder: Path) -> dict[str, float]:
    """`temperature` and `top_p` of generation_config.json, where given: defaults of MLC's requests."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = ("temperature", "top_p", "repetition_penalty")
    return {k: float(data[k]) for k in keys if isinstance(data, dict) and isinstance(data.get(k), int | float)}
