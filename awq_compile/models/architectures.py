"""The architecture table: one row per model family, and nothing about a family anywhere else.

A row says which projections carry a bias, whether queries and keys are normalised, and which linears
share an AWQ scale. To add a family, add a row; what a row cannot express is refused in `config.py`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from awq_compile.errors import ModelError


@dataclass(frozen=True)
class ScaleGroup:
    """Linears of a decoder layer that read the same activations, hence share one AWQ input scale s.

    `fold_into` names the operation that absorbs 1/s: a norm (its weight is divided by s, elementwise) or a
    projection (its output rows, and their bias, are divided by s). `scope` names the smallest module that
    contains every linear of the group: the loss is measured on its output.
    """

    linears: tuple[str, ...]
    fold_into: str
    scope: str


# Llama-like blocks: the q/k norms of Qwen3 sit behind the projections, so the input norm still folds.
# v → o: attention mixes positions but not channels, so a scale per V channel passes through; under
# grouped-query attention one V channel serves heads/kv_heads channels of o, which must share its scale.
_LLAMA_GROUPS: Final = (
    ScaleGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    ScaleGroup(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    ScaleGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    ScaleGroup(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True)
class Architecture:
    """One row: a family of decoder-only models that the decoder in `models/decoder.py` computes.

    `qkv_bias` and `o_bias` are True, False, or "attention_bias" to read that key of config.json;
    `qkv_name` is what MLC calls the fused q, k, v projection of this family.
    """

    hf_name: str
    model_type: str
    qkv_bias: bool | str
    o_bias: bool | str
    qk_norm: bool
    qkv_name: str
    scale_groups: tuple[ScaleGroup, ...] = _LLAMA_GROUPS

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantised linears within a layer, in forward order."""
        return tuple(name for group in self.scale_groups for name in group.linears)


ARCHITECTURES: Final = (
    Architecture("LlamaForCausalLM", "llama", "attention_bias", "attention_bias", qk_norm=False, qkv_name="qkv_proj"),
    Architecture("MistralForCausalLM", "mistral", False, False, qk_norm=False, qkv_name="qkv_proj"),
    # Qwen2 has no key for its biases: q, k and v always carry one.
    Architecture("Qwen2ForCausalLM", "qwen2", True, False, qk_norm=False, qkv_name="c_attn"),
    Architecture("Qwen3ForCausalLM", "qwen3", "attention_bias", "attention_bias", qk_norm=True, qkv_name="c_attn"),
)


def find_architecture(names: list[str], where: str) -> Architecture:
    """The one row that `architectures` of a config.json names; `where` is that file, for the error."""
    found = [row for row in ARCHITECTURES if row.hf_name in names]
    if len(found) == 1:
        return found[0]
    known = [row.hf_name for row in ARCHITECTURES]
    near = difflib.get_close_matches(names[0] if names else "", known, n=1)
    raise ModelError(
        f"{where}: architectures is {names or 'empty'}, and awq-compile knows {', '.join(known)}",
        hint=f"did you mean a {near[0]} model?" if near else "convert the model to one of these families",
    )
