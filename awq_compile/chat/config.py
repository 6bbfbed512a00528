"""mlc-chat-config.json: every key that MLC's C++ engine, its JSON FFI and its Python engine read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from awq_compile.chat.conv_template import ConvTemplate
from awq_compile.errors import ModelError
from awq_compile.formats import QuantScheme
from awq_compile.json_input import read_object
from awq_compile.limits import CompileOptions
from awq_compile.manifest import dump_json
from awq_compile.models.config import JsonFile, ModelConfig, token_ids

_MAX_TOKENIZER_BYTES: Final = 256 << 20
_VERSION: Final = "0.1.0"  # of the file's format, MLC's

# What a request gets that does not say: key → (MLC's default, least, most). The engine refuses other values.
_GENERATION: Final[dict[str, tuple[float, float, float]]] = {
    "temperature": (1.0, 0.0, 100.0),
    "top_p": (1.0, 0.0, 1.0),
    "presence_penalty": (0.0, -2.0, 2.0),
    "frequency_penalty": (0.0, -2.0, 2.0),
    "repetition_penalty": (1.0, 1e-3, 1e3),
}


def chat_config(
    config: ModelConfig,
    scheme: QuantScheme,
    options: CompileOptions,
    conversation: ConvTemplate,
    *,
    tokenizer_dir: Path,
    tokenizer_files: list[str],
) -> str:
    """The file's text. Raises `ModelError` for a generation_config.json or a tokenizer that the engine would refuse."""
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
    return dump_json(
        {
            "version": _VERSION,
            "model_type": config.model_type,
            "quantization": scheme.mlc_name,
            "model_config": model_config,
            "vocab_size": config.vocab_size,
            "active_vocab_size": config.active_vocab_size,
            **sizes,
            **generation_defaults(tokenizer_dir),
            "tokenizer_files": tokenizer_files,
            "tokenizer_info": tokenizer_info(tokenizer_dir / "tokenizer.json"),
            "conv_template": conversation.to_json(),
            "pad_token_id": _pad_token_id(tokenizer_dir),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "model_task": "chat",
            "embedding_metadata": None,
        }
    )


def generation_defaults(folder: Path) -> dict[str, float]:
    """Sampling defaults of the model's generation_config.json, completed with MLC's."""
    path = folder / "generation_config.json"
    file = JsonFile(path) if path.is_file() else None
    found = {}
    for key, (default, least, most) in _GENERATION.items():
        value = file.get(key, float, default) if file else default
        if not least <= value <= most:
            raise ModelError(f"{path}: {key} is {value}, expected {least} to {most}", hint="correct it, or remove it")
        found[key] = value
    return found


def _pad_token_id(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (ids := token_ids(JsonFile(folder / name), "pad_token_id")):
            return ids[0]
    return 0  # MLC's default


def tokenizer_info(path: Path) -> dict[str, Any]:
    """How MLC is to turn single tokens into text, from tokenizer.json; by the rules of its gen_config.

    `token_postproc_method`: byte_level when the decoder's last part of that kind says so, else byte_fallback;
    `prepend_space_in_encode`: the normaliser prepends ▁; `strip_space_in_decode`: the decoder strips one leading space.
    """
    data = read_object(path, ModelError, _MAX_TOKENIZER_BYTES)
    decoders, normalizers = (_parts(data, kind, kind + "s") for kind in ("decoder", "normalizer"))
    kinds = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
    methods = [kinds[one["type"]] for one in decoders if one.get("type") in kinds]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "token_postproc_method": methods[-1] if methods else "byte_fallback",
        "prepend_space_in_encode": {"type": "Prepend", "prepend": "▁"} in normalizers,
        "strip_space_in_decode": strip in decoders,
    }


def _parts(data: Any, kind: str, several: str) -> list[dict[str, Any]]:
    """The parts of a tokenizer's decoder or normaliser: those of a Sequence, or itself."""
    value = data.get(kind) if isinstance(data, dict) else None
    if not isinstance(value, dict):
        return []
    parts = value.get(several) if value.get("type") == "Sequence" else [value]
    return [one for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []
