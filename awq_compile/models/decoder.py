"""The decoder, written once, in floating point, on `tvm.relax.frontend.nn`: Llama, Mistral, Qwen2, Qwen3.

`export_decoder` gives an IRModule whose functions have the names and signatures that the MLC runtime
calls. Every function that reads weights takes all of them, one Relax variable each, in the order of
`model_parameters`; later passes replace them by packed ones and bundle them into one tuple.

Inside, hidden states have the shape (M, H): M rows, whatever sequences they belong to. The functions'
ranks, (1, n, H) or (b, 1, H), are only reshaped at the edges, so that prefill, decode of a batch and
verification share one kernel per operation. `decode` has M = 1 as a constant and gets its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm import IRModule, relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.models.gpu_sampling import GpuSampler, inplace_sampler_kernels, samples_on_device
from awq_compile.models.kv_cache import KVCache, create_kv_cache
from awq_compile.models.sampling import inplace_kernels, softmax_with_temperature
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cpu import cpu_target

# One token of each sequence: no size but the number of sequences changes from step to step.
DECODE_FUNCTIONS: Final = (
    "decode",
    "batch_decode",
    "decode_to_last_hidden_states",
    "batch_decode_to_last_hidden_states",
)


class _Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention: one matrix for q, k, v; rotary embedding happens in the KV cache."""

    def __init__(self, config: ModelConfig) -> None:
        c = config
        self.config = c
        rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        # Attributes in the order of `model_parameters`: the exporter takes parameters in this order.
        setattr(self, c.architecture.qkv_name, nn.Linear(c.hidden_size, rows, bias=c.qkv_bias))
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, -1, c.rms_norm_eps, bias=False)
            self.k_norm = nn.RMSNorm(c.head_dim, -1, c.rms_norm_eps, bias=False)

    def forward(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """(M, H) → (M, Hq*D), before the output projection."""
        c = self.config
        heads, kv_heads = c.num_heads, c.num_kv_heads
        qkv = getattr(self, c.architecture.qkv_name)(x)
        qkv = op.reshape(qkv, (x.shape[0], heads + 2 * kv_heads, c.head_dim))
        if c.qk_norm:
            q, k, v = op.split(qkv, [heads, heads + kv_heads], axis=1)
            qkv = op.concat([self.q_norm(q), self.k_norm(k), v], dim=1)
        out = cache.attention(layer, qkv, heads, c.head_dim**-0.5)
        return op.reshape(out, (x.shape[0], heads * c.head_dim))


class _MLP(nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)), gate over up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(M, H) → (M, F), before the down projection."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return op.silu(gate) * up


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, config: ModelConfig) -> None:
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)

    def forward(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """(M, H) → (M, H). A residual is added right behind its matmul, where the fusion pass looks for it."""
        x = self.self_attn.o_proj(self.self_attn(self.input_layernorm(x), cache, layer)) + x
        return self.mlp.down_proj(self.mlp(self.post_attention_layernorm(x))) + x


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, config: ModelConfig) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        """(M, H) → (M, H), before the last norm."""
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return x


def _rows(x: Tensor) -> Tensor:
    """(1, n, H) or (b, 1, H) → (M, H)."""
    first, second, hidden = x.shape
    return op.reshape(x, (second if first == 1 else first, hidden))


def _last_row(x: Tensor) -> Tensor:
    """(n, H) → (1, H)."""

    def last(x: te.Tensor) -> te.Tensor:
        rows, hidden = x.shape
        return te.compute((1, hidden), lambda _, j: x[rows - 1, j], name="last_row")

    return op.tensor_expr_op(last, "last_row", [x])


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(M, H), (b,) → (b, H)."""

    def take(x: te.Tensor, rows: te.Tensor) -> te.Tensor:
        return te.compute((rows.shape[0], x.shape[1]), lambda i, j: x[rows[i], j], name="take_rows")

    return op.tensor_expr_op(take, "take_rows", [x, rows])


class Decoder(nn.Module):  # type: ignore[misc]
    """Methods are the functions of the library; shapes are those of `_module_spec`."""

    def __init__(self, config: ModelConfig, sizes: CompileOptions, target: TargetSpec) -> None:
        self.config, self.sizes, self.target = config, sizes, target
        self.dtype = "float32"
        self.model = _Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Normalised (M, H) → (M, V) float32."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = op.matmul(hidden, op.permute_dims(weight))
        return logits if logits.dtype == "float32" else logits.astype("float32")

    def _hidden(self, x: Tensor, cache: KVCache, select: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Embeddings of rank 3 → last hidden states (M, H), normalised, of the rows that `select` keeps."""
        return self.model.norm(select(self.model(_rows(x), cache)))

    def embed(self, input_ids: Tensor) -> Tensor:
        weight = self.model.embed_tokens.weight
        # "clip": an id outside the vocabulary must not read outside the matrix.
        return op.wrap_nested(relax.op.take(weight._expr, input_ids._expr, axis=0, mode="clip"), "embed")

    def prefill(self, input_embed: Tensor, paged_kv_cache: KVCache) -> tuple[Tensor, KVCache]:
        logits = self._logits(self._hidden(input_embed, paged_kv_cache, _last_row))
        return op.reshape(logits, (1, 1, self.config.vocab_size)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: Tensor, logit_positions: Tensor, paged_kv_cache: KVCache
    ) -> tuple[Tensor, KVCache]:
        hidden = self._hidden(input_embeds, paged_kv_cache, lambda x: _take_rows(x, logit_positions))
        return op.unsqueeze(self._logits(hidden), 0), paged_kv_cache

    def decode(self, input_embed: Tensor, paged_kv_cache: KVCache) -> tuple[Tensor, KVCache]:
        return op.unsqueeze(self._logits(self._hidden(input_embed, paged_kv_cache)), 0), paged_kv_cache

    def batch_decode(self, input_embeds: Tensor, paged_kv_cache: KVCache) -> tuple[Tensor, KVCache]:
        return op.unsqueeze(self._logits(self._hidden(input_embeds, paged_kv_cache)), 1), paged_kv_cache

    def batch_verify(self, input_embeds: Tensor, paged_kv_cache: KVCache) -> tuple[Tensor, KVCache]:
        return op.unsqueeze(self._logits(self._hidden(input_embeds, paged_kv_cache)), 0), paged_kv_cache

    def to_last_hidden_states(self, input_embeds: Tensor, paged_kv_cache: KVCache) -> tuple[Tensor, KVCache]:
        """Exported five times, under the namesakes of the functions above."""
        return op.reshape(self._hidden(input_embeds, paged_kv_cache), input_embeds.shape), paged_kv_cache

    def get_logits(self, hidden_states: Tensor) -> Tensor:
        return self._logits(hidden_states)

    def batch_select_last_hidden_states(self, hidden_states: Tensor, logit_positions: Tensor) -> Tensor:
        return _take_rows(hidden_states, logit_positions)

    def alloc_embedding_tensor(self) -> Tensor:
        return op.empty((self.sizes.prefill_chunk_size, self.config.hidden_size), self.dtype)

    def softmax_with_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        return softmax_with_temperature(logits, temperature, self.config.active_vocab_size)

    def create_tir_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> KVCache:
        shape = relax.ShapeExpr(
            [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window]
        )
        return create_kv_cache(self.config, shape, self.dtype, self.target, self.sizes)


_CACHE_SHAPE = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")


def _module_spec(decoder: Decoder) -> nn.spec.ModuleSpec:
    """The exported functions and their arguments. Symbolic sizes: n tokens, b sequences, m rows."""
    spec, h, v, dtype = nn.spec.Tensor, decoder.config.hidden_size, decoder.config.vocab_size, decoder.dtype
    cache = {"paged_kv_cache": nn.spec.Object(object_type=KVCache)}
    positions = {"logit_positions": spec(["b"], "int32")}
    one, several = spec([1, "n", h], dtype), spec(["b", 1, h], dtype)
    with_weights: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "embed": (decoder.embed, {"input_ids": spec(["n"], "int32")}),
        "prefill": (decoder.prefill, {"input_embed": one, **cache}),
        "decode": (decoder.decode, {"input_embed": spec([1, 1, h], dtype), **cache}),
        "batch_prefill": (decoder.batch_prefill, {"input_embeds": one, **positions, **cache}),
        "batch_decode": (decoder.batch_decode, {"input_embeds": several, **cache}),
        "batch_verify": (decoder.batch_verify, {"input_embeds": one, **cache}),
        "get_logits": (decoder.get_logits, {"hidden_states": spec(["m", h], dtype)}),
    }
    for name in ("prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"):
        arguments = with_weights[name][1]
        embeds = arguments.get("input_embed") or arguments["input_embeds"]
        found = (decoder.to_last_hidden_states, {"input_embeds": embeds, **cache})
        with_weights[f"{name}_to_last_hidden_states"] = found
    without_weights: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "batch_select_last_hidden_states": (
            decoder.batch_select_last_hidden_states,
            {"hidden_states": spec(["m", h], dtype), **positions},
        ),
        "alloc_embedding_tensor": (decoder.alloc_embedding_tensor, {}),
        "softmax_with_temperature": (
            decoder.softmax_with_temperature,
            {"logits": spec(["b", 1, v], "float32"), "temperature": spec(["b"], "float32")},
        ),
        "create_tir_paged_kv_cache": (
            decoder.create_tir_paged_kv_cache,
            dict.fromkeys(_CACHE_SHAPE, nn.spec.Int()),
        ),
    }
    if samples_on_device(decoder.target):
        sampler = GpuSampler(v)
        without_weights |= {name: (getattr(sampler, name), arguments) for name, arguments in sampler.specs().items()}
    names, methods = [], []
    for mode, functions in (("plain", with_weights), ("none", without_weights)):
        for name, (method, arguments) in functions.items():
            names.append(name)
            methods.append(
                nn.spec.MethodSpec(
                    method, list(arguments), list(arguments.values()), param_mode=mode, effect_mode="none"
                )
            )
    return nn.spec.ModuleSpec(decoder, names, methods)


def export_decoder(
    config: ModelConfig, sizes: CompileOptions, dtype: str, target: TargetSpec | None = None
) -> tuple[IRModule, list[str]]:
    """The module and the names of its parameters, which are those of `model_parameters`, in its order.

    Weights, hidden states and KV cache are `dtype` (float32 or float16), logits always float32. `target` chooses the
    kernels that are PrimFuncs already: the KV cache's, those that write in place, the samplers. Without one they are
    for this machine's CPU.
    """
    decoder = Decoder(config, sizes, target or cpu_target(""))
    decoder.to(dtype)
    module, parameters = decoder.export_tvm(_module_spec(decoder))
    for var, function in list(module.functions.items()):
        if isinstance(function, relax.Function) and len(function.params) == function.attrs["num_input"]:
            # No weights: without the attribute, bundling them adds no empty tuple to the signature.
            module[var] = function.without_attr("num_input")
    kernels = inplace_kernels(config.vocab_size, config.hidden_size, dtype, decoder.target.block_threads)
    if samples_on_device(decoder.target):
        kernels |= inplace_sampler_kernels(config.vocab_size)
    for name, kernel in kernels.items():
        module[name] = kernel
    return module, [name for name, _ in parameters]
