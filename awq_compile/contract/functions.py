"""The functions that MLC's engine calls, as data. H is the hidden size, V the vocabulary, dt the model's dtype.

Sources: cpp/serve/function_table.cc (which are looked up, and where), model.cc and sampler/ (their arguments) of
mlc-llm, and what its engine did here when a function was hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from awq_compile.contract.signature import (
    ANYTHING,
    NOTHING,
    OBJECT,
    TEXT,
    ParamsType,
    ShapeType,
    Signature,
    Size,
    TensorType,
    TupleType,
    Type,
)

Shape = tuple[Size, ...]

# The devices whose tokens MLC samples by functions of the library (Sampler::SupportGPUSampler).
SAMPLING_DEVICES: Final = frozenset({"cuda", "vulkan", "metal"})

# Exported, these make the engine take another path than that of a plain KV cache.
FORBIDDEN: Final = {
    "create_rnn_state": "the engine takes it instead of create_tir_paged_kv_cache",
    "create_flashinfer_paged_kv_cache": "the engine takes it instead of create_tir_paged_kv_cache",
    "extend": "the engine takes it instead of prefill for sequences that have begun",
    "batch_extend": "the engine takes it instead of batch_prefill for sequences that have begun",
}


@dataclass(frozen=True)
class Sizes:
    """What the signatures of one model depend on."""

    hidden_size: int
    vocab_size: int
    prefill_chunk_size: int
    num_params: int
    dtype: str


@dataclass(frozen=True)
class Demand:
    """A function that must be there. `without` says what happens if it is not."""

    name: str
    signature: Signature
    without: str


def demands(sizes: Sizes, device: str) -> Iterator[Demand]:
    """Every function of a library for a device: `llvm`, `cuda`, `vulkan`, `metal` or `opencl`."""
    yield from _model(sizes)
    yield from _logits(sizes)
    yield from _speculation(sizes)
    if device in SAMPLING_DEVICES:
        yield from _sampling(sizes)


def _model(sizes: Sizes) -> Iterator[Demand]:
    h, v, dt = sizes.hidden_size, sizes.vocab_size, sizes.dtype
    params = ParamsType(sizes.num_params)
    crash, load = "the engine crashes", "the engine cannot load the library"
    batch = "the engine fails even with one request at a time"
    yield Demand("_metadata", Signature((), TEXT), load)
    yield Demand("alloc_embedding_tensor", Signature((), _tensor(dt, sizes.prefill_chunk_size, h)), load)
    yield Demand("embed", Signature((_tensor("int32", "n"), params), _tensor(dt, "n", h)), crash)
    forward: tuple[tuple[str, Shape, bool, Shape, str], ...] = (
        ("prefill", (1, "n"), False, (1, 1), crash),
        ("decode", (1, 1), False, (1, 1), crash),
        ("batch_prefill", (1, "n"), True, (1, "b"), batch),
        ("batch_decode", ("b", 1), False, ("b", 1), batch),
    )
    for name, rows, positions, logits, without in forward:
        yield Demand(name, _forward(sizes, rows, positions, _tensor("float32", *logits, v)), without)
    yield Demand("create_tir_paged_kv_cache", Signature((ShapeType(1),) * 5, OBJECT), crash)


def _logits(sizes: Sizes) -> Iterator[Demand]:
    v = sizes.vocab_size
    logits, rows = _tensor("float32", "b", v), _tensor("int32", "q")
    positions = tokens = _tensor("int32", "t")
    start = "the engine does not start"
    batch = _tensor("float32", "b", 1, v)
    softmax = Signature((batch, _tensor("float32", "b")), batch)
    yield Demand("softmax_with_temperature", softmax, "the engine crashes")
    yield Demand("apply_logit_bias_inplace", _in_place(logits, positions, tokens, _tensor("float32", "t")), start)
    penalties = (rows, positions, tokens, _tensor("int32", "t"), _tensor("float32", "q", 3))
    yield Demand("apply_penalty_inplace", _in_place(logits, *penalties), start)
    yield Demand("apply_bitmask_inplace", _in_place(logits, rows, _tensor("int32", "b", (v + 31) // 32)), start)


def _speculation(sizes: Sizes) -> Iterator[Demand]:
    h, v, dt = sizes.hidden_size, sizes.vocab_size, sizes.dtype
    without = "speculative decoding fails"
    yield Demand("batch_verify", _forward(sizes, (1, "n"), False, _tensor("float32", 1, "n", v)), without)
    forward: dict[str, Shape] = {"decode": (1, 1), "batch_decode": ("b", 1)}
    forward |= dict.fromkeys(("prefill", "batch_prefill", "batch_verify"), (1, "n"))
    for name, rows in forward.items():
        hidden = _tensor(dt, *rows, h)
        yield Demand(f"{name}_to_last_hidden_states", _forward(sizes, rows, False, hidden), without)
    hidden = _tensor(dt, "m", h)
    params = ParamsType(sizes.num_params)
    yield Demand("get_logits", Signature((hidden, params), _tensor("float32", "m", v)), without)
    selected = Signature((hidden, _tensor("int32", "b")), _tensor(dt, "b", h))
    yield Demand("batch_select_last_hidden_states", selected, without)
    indices = _tensor("int32", "b")
    for what, width, dtype in (("probs", v, "float32"), ("hidden_states", h, dt)):
        many, few = _tensor(dtype, "m", width), _tensor(dtype, "b", width)
        yield Demand(f"gather_{what}", _in_place(many, indices, few), without)
        yield Demand(f"scatter_{what}", _in_place(few, indices, many), without)


def _sampling(sizes: Sizes) -> Iterator[Demand]:
    v = sizes.vocab_size
    start, without = "the engine does not start on this device", "speculative decoding fails on this device"
    probs, order = _tensor("float32", "b", v), _tensor("int32", "b", v)
    chances, picked = _tensor("float32", "k"), _tensor("int32", "k")
    yield Demand("multinomial_from_uniform", Signature((probs, chances, picked), picked), start)
    yield Demand("argsort_probs", Signature((probs,), TupleType((probs, order))), start)
    top = Signature((probs, order, chances, picked, _tensor("float32", "b")), picked)
    yield Demand("sample_with_top_p", top, start)
    offsets = _tensor("int32", "p")
    taken = TupleType((chances, _tensor("float32", "p"), offsets))
    yield Demand("sampler_take_probs", Signature((probs, order, picked, picked, offsets), taken), start)
    pivots = _tensor("float32", "b", 3)
    yield Demand("renormalize_by_top_p", Signature((probs, _tensor("float32", "b"), pivots), probs), without)
    draft, node = _tensor("float32", "m", v), _tensor("int32", "m")
    verify = (draft, node, draft, node, node, _tensor("float32", "m"), _tensor("int32", "c"))
    yield Demand("sampler_verify_draft_tokens", Signature(verify, ANYTHING), without)


def _forward(sizes: Sizes, rows: Shape, positions: bool, result: Type) -> Signature:
    """Embeddings, KV cache and parameters in; a pair with the same KV cache out."""
    chosen = (_tensor("int32", "b"),) if positions else ()
    embeds = _tensor(sizes.dtype, *rows, sizes.hidden_size)
    return Signature((embeds, *chosen, OBJECT, ParamsType(sizes.num_params)), TupleType((result, OBJECT)))


def _in_place(*arguments: Type) -> Signature:
    return Signature(arguments, NOTHING)


def _tensor(dtype: str, *shape: Size) -> TensorType:
    return TensorType(shape, dtype)
