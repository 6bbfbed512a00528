"""The paged KV cache: TVM's runtime object, created with the kernels that rotate, append and attend."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import ir, relax
from tvm.relax.frontend.nn import Object, Tensor
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kernels
from tvm.target import Target
from tvm.target.codegen import target_has_features

from awq_compile.errors import CompileError
from awq_compile.kernels import cpu_attention
from awq_compile.kernels.cpu_attention import AttentionShape
from awq_compile.kernels.merge_state import merge_state
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


def rope_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Angle per position of each pair of elements (D/2,), in float32 as transformers computes it.

    With llama3 scaling, a frequency f of wavelength w = 2 pi / f in a model trained on c positions stays
    where w < c / high, is divided by `factor` where w > c / low, and is blended in between by
    t = (c / w - low) / (high - low):  (1 - t) f / factor + t f.
    """
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    frequencies = np.asarray(1 / np.power(np.float32(config.rope_theta), exponents), np.float32)
    if (s := config.rope_scaling) is None:
        return frequencies
    turns = s.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)
    t = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return np.asarray((1 - t) * frequencies / s.factor + t * frequencies, np.float32)


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
    """Emits the creation of a cache of `shape`: sequences, tokens in all, prefill chunk, page size, sliding window.

    On the CPU the kernels are ours; elsewhere they are TVM's.
    """
    create = _create_for_cpu if target.kind.name == "llvm" else _create_for_gpu
    if page_size != cpu_attention.PAGE:
        raise CompileError(f"page size {page_size} is not supported: the attention kernels have {cpu_attention.PAGE}")
    return KVCache(_expr=create(config, list(shape.values), dtype, target), _name="paged_kv_cache")


def _lanes(target: Target) -> int:
    """Floats in a vector register."""
    return next(
        (lanes for feature, lanes in (("avx512f", 16), ("avx", 8)) if target_has_features([feature], target)), 4
    )


def _create_for_cpu(c: ModelConfig, shape: list[Any], dtype: str, target: Target) -> Any:
    """Arguments in the order of `vm.builtin.paged_attention_kv_cache_create`."""
    builder, t = relax.BlockBuilder.current(), tvm_kernels
    heads, kv_heads, dim = c.num_heads, c.num_kv_heads, c.head_dim
    sizes, scaling = AttentionShape(heads, kv_heads, dim, dtype, _lanes(target)), _rope_scaling(c)

    def kernel(function: Any, name: str) -> Any:
        return builder.add_func(function.with_attr("global_symbol", name), name)

    def attention(function: Any, name: str) -> Any:
        return relax.Tuple([ir.StringImm("tirx"), kernel(function, name)])

    # Token trees (speculative decoding) are rare: TVM's scalar kernels serve them.
    paged_tree = t.tree_attn_with_paged_kv_cache_cpu(kv_heads, heads, dim, dtype, scaling)
    arguments = [
        relax.ShapeExpr(shape),
        relax.ShapeExpr([0, c.num_layers]),
        *(relax.prim_value(size) for size in (heads, kv_heads, dim, dim)),
        relax.ShapeExpr([int(t.AttnKind.MHA)] * c.num_layers),
        relax.prim_value(False),  # no transfer between machines
        relax.prim_value(t.RopeMode.NORMAL),
        relax.prim_value(1),
        relax.prim_value(c.rope_theta),
        relax.prim_value(0),  # no longrope factors
        relax.op.zeros((), dtype),
        kernel(t._kv_cache_transpose_append(kv_heads, dim, dtype), "kv_cache_transpose_append"),
        kernel(t._kv_cache_transpose_append_mla(dim, dtype), "kv_cache_transpose_append_mla"),
        attention(cpu_attention.ragged_prefill(sizes), "attention_ragged_prefill"),
        attention(cpu_attention.paged_prefill(sizes), "attention_paged_prefill"),
        attention(cpu_attention.paged_decode(sizes), "attention_paged_decode"),
        relax.Tuple([]),  # no sliding windows: `config.py` caps the context instead
        relax.Tuple([]),
        # The runtime takes the paged one first; TVM's own CPU cache passes these two the other way round.
        attention(paged_tree, "attention_paged_tree"),
        attention(t.tree_attn_cpu(kv_heads, heads, dim, dtype, scaling), "attention_ragged_tree"),
        relax.Tuple([]),  # no multi-head latent attention
        relax.Tuple([kernel(cpu_attention.merge_state(sizes), "attention_merge_state")]),
        kernel(cpu_attention.split_rotary(sizes, rope_frequencies(c)), "attention_split_rotary"),
        kernel(t._copy_single_page_cpu(kv_heads, cpu_attention.PAGE, dim, dtype), "kv_cache_copy_single_page"),
        kernel(t._kv_cache_debug_get_kv(c.num_layers, kv_heads, dim, dtype), "kv_cache_debug_get_kv"),
        kernel(t._compact_kv_copy_cpu(kv_heads, dim, dtype), "kv_cache_compact_kv_copy"),
    ]
    return relax.call_pure_packed("vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType())


def _create_for_gpu(c: ModelConfig, shape: list[Any], dtype: str, target: Target) -> Any:
    batch, total, chunk, page, sliding = shape
    cache = tvm_kernels.TIRPagedKVCache(
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
        rope_mode=tvm_kernels.RopeMode.NORMAL,
        rope_scale=1,
        rope_theta=c.rope_theta,
        rope_scaling=_rope_scaling(c),
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=c.head_dim,
        enable_disaggregation=False,
        dtype=dtype,
        target=target,
    )
    builder = relax.BlockBuilder.current()
    merge = next(v for v in builder.get().get_global_vars() if v.name_hint == "tir_attention_merge_state")
    threads = int(target.attrs["max_num_threads"])
    builder.update_func(merge, merge_state(c.num_heads, c.head_dim, dtype, threads))  # TVM's own races
    return cache._expr
