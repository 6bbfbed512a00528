"""Models as ordinary transformers models in float32: a quantised one with dequantised weights, and the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from awq_compile.awq.checkpoint import QuantizedModel
from awq_compile.formats import QuantizedMatrix, dequantize_matrix
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.weights import Weights, expected_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def dequantized_model(model: QuantizedModel) -> PreTrainedModel:
    """A float32 `…ForCausalLM` of transformers that computes with exactly the values that the codes stand for."""
    import torch

    state = {}
    for name, shape in expected_tensors(model.config):
        value = model.matrix(name) if len(shape) == 2 else model.vector(name)
        array = dequantize_matrix(value) if isinstance(value, QuantizedMatrix) else value.astype(np.float32)
        state[name] = torch.from_numpy(array)
    return _build(model.config, model.path, state)


def float_model(model_dir: Path) -> PreTrainedModel:
    """The original as a float32 `…ForCausalLM` of transformers, its weights read through `Weights`."""
    config = read_config(model_dir)
    weights = Weights(model_dir, config)
    return _build(config, model_dir, {name: weights.tensor(name) for name, _ in expected_tensors(config)})


def _build(config: ModelConfig, path: Path, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    import torch

    from awq_compile.awq.block import model_class

    hf_class, hf_config = model_class(config, path)
    with torch.device("meta"):
        found: Any = hf_class(hf_config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    found.load_state_dict(state, assign=True)
    found.tie_weights()
    found.model.rotary_emb = type(found.model.rotary_emb)(hf_config)  # its buffers are no part of the state
    return found.eval()  # type: ignore[no-any-return]
