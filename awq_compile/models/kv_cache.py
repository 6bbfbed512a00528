"""The paged KV cache: TVM's runtime object, created with the kernels that rotate, append and attend."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.nn import Object, Tensor
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache
from tvm.target import Target

from awq_compile.models.config import ModelConfig


class KVCache(Object):  # type: ignore[misc]
    """Handle of the cache within an exported function."""

    def attention(self, layer: int, qkv: Tensor, heads: int, scale: float) -> Tensor:
        """Rotates q and k, appends k and v, attends: qkv (M, Hq + 2*Hkv, D) → (M, Hq, D)."""
        rows, _, head_dim = qkv.shape
        call = relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [self._expr, relax.prim_value(layer), relax.prim_value(scale), qkv._expr],
            out_ty=relax.TensorType((rows, heads, head_dim), qkv.dtype),
        )
        return Tensor(_expr=relax.BlockBuilder.current().emit(call))


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    """Rotary scaling in the words of TVM's kernels."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def create_kv_cache(config: ModelConfig, shape: relax.ShapeExpr, dtype: str, target: Target, page_size: int) -> KVCache:
    """Emits the creation of a cache of `shape`: sequences, tokens in all, prefill chunk, page size, sliding window."""
    c = config
    batch, total, chunk, page, sliding = shape.values
    cache = TIRPagedKVCache(
        attn_kind="mha",
        max_batch_size=batch,
        max_total_seq_len=total,
        prefill_chunk_size=chunk,
        page_size=page,
        support_sliding_window=sliding,
        layer_partition=relax.ShapeExpr([0, c.num_layers]),
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        qk_head_dim=c.head_dim,
        v_head_dim=c.head_dim,
        mla_original_qk_head_dim=0,
        mla_original_v_head_dim=0,
        rope_mode=RopeMode.NORMAL,
        rope_scale=1,
        rope_theta=c.rope_theta,
        rope_scaling=_rope_scaling(c),
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=c.head_dim,
        enable_disaggregation=False,
        dtype=dtype,
        target=target,
    )
    return KVCache(_expr=cache._expr, _name="paged_kv_cache")
