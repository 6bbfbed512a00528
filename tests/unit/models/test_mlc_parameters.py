"""Parameters are MLC's own: `golden/mlc_parameters.json` was printed by mlc-llm of 2026-07-23 (under TVM 0.26).

There: `MODELS[family].quantize[kind](config, QUANTIZATION[name])[0].named_parameters()`, for these configurations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq_compile.formats import QuantScheme
from awq_compile.models.config import read_config
from awq_compile.models.parameters import model_parameters

GOLDEN: dict[str, list[Any]] = json.loads((Path(__file__).parents[2] / "golden" / "mlc_parameters.json").read_text())
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 101}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralForCausalLM", {"head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
}


@pytest.mark.parametrize("key", GOLDEN)
def test_names_order_shapes_and_types_are_mlcs(key: str, tmp_path: Path) -> None:
    family, quantization = key.split()
    architecture, changed = FAMILIES[family]
    config = {"architectures": [architecture], "model_type": family, **SIZES, **HEADS, **changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scheme = QuantScheme.parse({"q4f16_2": "w4g32"}.get(quantization, quantization))
    assert scheme.mlc_name == quantization
    found = [
        [name, list(shape), dtype]
        for parameter in model_parameters(read_config(tmp_path), scheme)
        for name, (shape, dtype) in parameter.arrays().items()
    ]
    assert found == GOLDEN[key]
