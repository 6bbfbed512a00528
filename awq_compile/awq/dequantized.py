"""A quantised model as an ordinary transformers model, with dequantised float32 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from awq_compile.awq.checkpoint import QuantizedModel
from awq_compile.formats import QuantizedMatrix, dequantize_matrix
from awq_compile.models.weights import expected_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantized_model(model: QuantizedModel) -> PreTrainedModel:
    """A float32 `…ForCausalLM` of transformers that computes with exactly the values that the codes stand for."""
    import torch

    from awq_compile.awq.block import model_class

    hf_class, hf_config = model_class(model.config, model.path)
    with torch.device("meta"):
        found = hf_class(hf_config)
    found.to_empty(device="cpu")
    state: dict[str, Any] = {}
    for name, shape in expected_tensors(model.config):
        value = model.matrix(name) if len(shape) == 2 else model.vector(name)
        array = dequantize_matrix(value) if isinstance(value, QuantizedMatrix) else value.astype(np.float32)
        state[name] = torch.from_numpy(array)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    found.load_state_dict(state, assign=True)
    found.tie_weights()
    found.model.rotary_emb = type(found.model.rotary_emb)(hf_config)  # its buffers were left empty
    return found.eval()  # type: ignore[no-any-return]
