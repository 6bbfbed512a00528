"""The paged KV cache: TVM's runtime object, created with the kernels that rotate, append and attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tvm import ir, relax
from tvm.relax.frontend.nn import Object, Tensor
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kernels
from tvm.target import Target
from tvm.target.codegen import target_has_features

from awq_compile.kernels import cpu_attention, gpu_attention, mma_attention
from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.decode_plan import DecodePlan
from awq_compile.kernels.merge_state import merge_state
from awq_compile.limits import DEFAULT_PAGE, CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.gpu import GpuTarget

ATTENTION: Final = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"


class KVCache(Object):  # type: ignore[misc]
    """Handle of the cache within an exported function."""

    def attention(self, layer: int, qkv: Tensor, heads: int, scale: float) -> Tensor:
        """Rotates q and k, appends k and v, attends: qkv (M, Hq + 2*Hkv, D) → (M, Hq, D)."""
        rows, _, head_dim = qkv.shape
        call = relax.call_dps_packed(
            ATTENTION,
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


def create_kv_cache(
    config: ModelConfig, shape: relax.ShapeExpr, dtype: str, target: TargetSpec, sizes: CompileOptions
) -> KVCache:
    """Emits the creation of a cache of `shape`: sequences, tokens in all, prefill chunk, page size, sliding window.

    On the CPU the kernels are ours, except for sliding windows and token trees. On GPUs attention in decoding, where
    the target says so also that of new tokens, both without a sliding window, and the merging of states are ours, and
    the others TVM's.
    """
    kernels = _Kernels(config, dtype, Target(target.tvm_target), sizes)
    found = kernels.for_gpu(target) if isinstance(target, GpuTarget) else kernels.for_cpu()
    arguments = [
        shape,
        relax.ShapeExpr([0, config.num_layers]),
        *(relax.prim_value(size) for size in (config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim)),
        relax.ShapeExpr([int(tvm_kernels.AttnKind.MHA)] * config.num_layers),
        relax.prim_value(False),  # no transfer between machines
        relax.prim_value(tvm_kernels.RopeMode.NORMAL),
        relax.prim_value(1),
        relax.prim_value(config.rope_theta),
        relax.prim_value(0),  # no longrope factors
        relax.op.zeros((), dtype),
        *found,
    ]
    create = relax.call_pure_packed("vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType())
    return KVCache(_expr=create, _name="paged_kv_cache")


def attention_workspace_bytes(config: ModelConfig, target: TargetSpec, sizes: CompileOptions) -> int:
    """The most that the cache's kernels take from TVM's runtime: ours for decoding does, on GPUs without a window."""
    if not isinstance(target, GpuTarget) or sizes.sliding_window_size is not None:
        return 0
    plan = DecodePlan.of(_gpu_shape(config, target.dtype, sizes), target.decode_attention)
    pages_of_sequence = -(-sizes.cached_tokens // sizes.page_size)
    return plan.workspace_bytes(sizes.max_batch_size, sizes.max_batch_size * pages_of_sequence)


def _gpu_shape(c: ModelConfig, dtype: str, sizes: CompileOptions) -> AttentionShape:
    return AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, dtype, page=sizes.page_size)


def _lanes(target: Target) -> int:
    """Floats in a vector register."""
    return next(
        (lanes for feature, lanes in (("avx512f", 16), ("avx", 8)) if target_has_features([feature], target)), 4
    )


@dataclass(frozen=True)
class _Kernels:
    """The kernels of a cache, in the order of `vm.builtin.paged_attention_kv_cache_create`'s arguments."""

    config: ModelConfig
    dtype: str
    target: Target
    sizes: CompileOptions

    def for_cpu(self) -> list[Any]:
        """Ours; TVM's scalar ones for token trees, which are rare, and where rotation happens within attention.

        With a sliding window the cache holds keys that are not rotated yet, for their positions change.
        """
        c, t, page, dtype = self.config, tvm_kernels, self.sizes.page_size, self.dtype
        heads, kv_heads, dim = c.num_heads, c.num_kv_heads, c.head_dim
        shape, scaling = AttentionShape(heads, kv_heads, dim, dtype, _lanes(self.target), page), _rope_scaling(c)
        if self.sizes.sliding_window_size is None:
            ragged, sliding = cpu_attention.ragged_prefill(shape), [relax.Tuple([]), relax.Tuple([])]
        else:
            ragged = t._attention_prefill_ragged_cpu(kv_heads, heads, dim, dim, dtype, scaling)
            windowed = (kv_heads, heads, dim, dtype, True, scaling)
            sliding = [
                self._attention(t._attention_prefill_cpu(*windowed, page_size=page), "attention_sliding_prefill"),
                self._attention(t._attention_decode_cpu(*windowed, page_size=page), "attention_sliding_decode"),
            ]
        return [
            *self._appending(),
            self._attention(ragged, "attention_ragged_prefill"),
            self._attention(cpu_attention.paged_prefill(shape), "attention_paged_prefill"),
            self._attention(cpu_attention.paged_decode(shape), "attention_paged_decode"),
            *sliding,
            # The runtime takes the paged one first; TVM's own CPU cache passes these two the other way round.
            self._paged_tree(
                t.tree_attn_with_paged_kv_cache_cpu(kv_heads, heads, dim, dtype, scaling), "attention_paged_tree"
            ),
            self._attention(t.tree_attn_cpu(kv_heads, heads, dim, dtype, scaling), "attention_ragged_tree"),
            relax.Tuple([]),  # no multi-head latent attention
            relax.Tuple([self._kernel(cpu_attention.merge_state(shape), "attention_merge_state")]),
            self._kernel(cpu_attention.split_rotary(shape, rope_frequencies(c)), "attention_split_rotary"),
            self._kernel(t._copy_single_page_cpu(kv_heads, page, dim, dtype), "kv_cache_copy_single_page"),
            self._kernel(t._kv_cache_debug_get_kv(c.num_layers, kv_heads, dim, dtype), "kv_cache_debug_get_kv"),
            self._kernel(t._compact_kv_copy_cpu(kv_heads, dim, dtype, page), "kv_cache_compact_kv_copy"),
        ]

    def for_gpu(self, gpu: GpuTarget) -> list[Any]:
        """TVM's, but for three: decoding, where TVM's has a block for all positions; new tokens where the GPU takes
        `mma_attention`, since TVM's does without tensor cores; merging, where TVM's races.

        The runtime rotates within attention, `rotary_mode` 1, in caches with a sliding window; those take the kernels
        of their own for all layers, so that ours never has to.
        """
        c, t, page, dtype, target = self.config, tvm_kernels, self.sizes.page_size, self.dtype, self.target
        heads, kv_heads, dim, scaling = c.num_heads, c.num_kv_heads, c.head_dim, _rope_scaling(c)
        attend, shape = (kv_heads, heads, dim, dtype), _gpu_shape(c, dtype, self.sizes)
        rotary = t.llama_rope_with_position_map(c.rope_theta, 1, dim, heads, kv_heads, dtype, scaling, dim)
        return [
            *self._appending(),
            *self._prefill(shape, mma=gpu.mma_attention),
            self._attention(gpu_attention.paged_decode(shape, gpu.decode_attention, "attention_paged_decode")),
            self._attention(t._attention_prefill(*attend, True, scaling, target, page_size=page)),
            self._attention(t._attention_decode(*attend, True, scaling, target, page_size=page)),
            self._paged_tree(t.tree_attn_with_paged_kv_cache(*attend, scaling, target)),
            self._attention(t.tree_attn(*attend, scaling, target)),
            relax.Tuple([]),  # no multi-head latent attention
            relax.Tuple([self._kernel(merge_state(heads, dim, dtype, gpu.limits.max_threads))]),
            self._kernel(rotary),
            self._kernel(t._copy_single_page(kv_heads, page, dim, dtype, target)),
            self._kernel(t._kv_cache_debug_get_kv(c.num_layers, kv_heads, dim, dtype)),
            self._kernel(t._compact_kv_copy(kv_heads, dim, dtype, target, page)),
        ]

    def _prefill(self, shape: AttentionShape, *, mma: bool) -> list[Any]:
        """Of new tokens among themselves, and against pages; by `mma_attention` where that serves."""
        t, target, scaling = tvm_kernels, self.target, _rope_scaling(self.config)
        if mma and self.sizes.sliding_window_size is None and mma_attention.supports(shape):
            ragged = mma_attention.ragged_prefill(shape, "attention_ragged_prefill")
            paged = mma_attention.paged_prefill(shape, "attention_paged_prefill")
        else:
            heads, kv_heads, dim, dtype = shape.heads, shape.kv_heads, shape.head_dim, shape.dtype
            ragged = t._attention_prefill_ragged(kv_heads, heads, dim, dim, dtype, scaling, target)
            paged = t._attention_prefill(kv_heads, heads, dim, dtype, False, scaling, target, page_size=shape.page)
        return [self._attention(ragged), self._attention(paged)]

    def _appending(self) -> list[Any]:
        t, c = tvm_kernels, self.config
        sizes = (c.num_kv_heads, c.head_dim, self.dtype, self.sizes.page_size)
        mla = t._kv_cache_transpose_append_mla(c.head_dim, self.dtype, self.sizes.page_size)
        return [self._kernel(t._kv_cache_transpose_append(*sizes)), self._kernel(mla)]

    def _kernel(self, function: Any, name: str = "") -> Any:
        """Adds a PrimFunc under `name`, else under its own."""
        name = name or str(function.attrs["global_symbol"])
        return relax.BlockBuilder.current().add_func(function.with_attr("global_symbol", name), name)

    def _attention(self, function: Any, name: str = "") -> Any:
        return relax.Tuple([ir.StringImm("tirx"), self._kernel(function, name)])

    def _paged_tree(self, function: Any, name: str = "") -> Any:
        """TVM's kernel for token trees knows one page size; without it the runtime refuses such trees."""
        if self.sizes.page_size != DEFAULT_PAGE:
            return relax.Tuple([])
        return self._attention(function, name)
