"""Parameters of the compiled model: MLC's names, order and fusions, and where each comes from.

Parameters are the rows of Hugging Face matrices, stacked: `qkv_proj` is q over k over v, `gate_up_proj`
is gate over up. A matrix parameter `X.weight` becomes `X.q_weight`, `X.q_scale` (and `X.q_zero`) when its
`WeightSpec` is quantised; packing along K leaves rows apart, so stacking packed rows is concatenation, along
the first axis in NK and along the second in KN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from awq_compile.formats import QuantScheme, WeightSpec, packed_name
from awq_compile.models.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One floating-point parameter of the decoder, before quantisation.

    `sources` are Hugging Face tensor names whose rows are stacked. `spec` is the format of a matrix that a
    matmul or an embedding reads, None for norm weights and biases, which stay float16.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    spec: WeightSpec | None

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → (shape, dtype) of the arrays that this parameter becomes, in order."""
        if self.spec is None:
            return {self.name: (self.shape, "float16")}
        n, k = self.shape
        return {packed_name(self.name, suffix): found for suffix, found in self.spec.arrays(n, k).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays().values())


def model_parameters(config: ModelConfig, scheme: QuantScheme) -> list[Parameter]:
    """Every parameter in MLC's order: embedding, layers, final norm, LM head (absent when tied)."""
    c = config
    found: list[Parameter] = []

    def add(name: str, shape: tuple[int, ...], sources: tuple[str, ...], spec: WeightSpec | None = None) -> None:
        found.append(Parameter(name, shape, sources, spec))

    def projection(prefix: str, name: str, parts: tuple[str, ...], bias: bool) -> None:
        shapes = [c.linear_shape(part) for part in parts]
        n = sum(shape[0] for shape in shapes)
        add(f"{prefix}{name}.weight", (n, shapes[0][1]), tuple(f"{prefix}{p}.weight" for p in parts), scheme.linear)
        if bias:
            add(f"{prefix}{name}.bias", (n,), tuple(f"{prefix}{p}.bias" for p in parts))

    add("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), ("model.embed_tokens.weight",), scheme.head)
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        projection(p, f"self_attn.{c.architecture.qkv_name}", qkv, c.qkv_bias)
        projection(p, "self_attn.o_proj", ("self_attn.o_proj",), c.o_bias)
        if c.qk_norm:
            for norm in ("q_norm", "k_norm"):
                add(f"{p}self_attn.{norm}.weight", (c.head_dim,), (f"{p}self_attn.{norm}.weight",))
        projection(p, "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), bias=False)
        projection(p, "mlp.down_proj", ("mlp.down_proj",), bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{p}{norm}.weight", (c.hidden_size,), (f"{p}{norm}.weight",))
    add("model.norm.weight", (c.hidden_size,), ("model.norm.weight",))
    if not c.tie_word_embeddings:
        add("lm_head.weight", (c.vocab_size, c.hidden_size), ("lm_head.weight",), scheme.lm_head)
    return found
