"""What each PrimFunc of a library must compute, found by compiling the model again up to its unscheduled PrimFuncs.

Planned linears and embeddings are known by their attributes; what the MLC runtime and TVM's KV cache call has
fixed names; everything else is compared with LLVM. What the attributes say is kept apart, as facts that JSON can hold:
with them and LLVM's code, `scripts/verify_shapes` verifies where TVM's compiler is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from awq_compile.compiler import CompileContext, lowered_module
from awq_compile.formats import Float16Spec, QuantScheme, QuantSpec, WeightSpec
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.models.parameters import model_parameters
from awq_compile.problem import decode_problem
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.database import known_records
from awq_compile.verify.case import Case
from awq_compile.verify.cases import attention, cache, engine, sampler
from awq_compile.verify.cases.generic import Reference, build_references, generic_cases
from awq_compile.verify.cases.linear import embedding_cases, linear_cases
from awq_compile.verify.launch_table import Table, bounds_of

# Of every bucket, and for tiles of four rows every length of the last one: a bound off by one misses only one of them.
ROWS: Final = (1, 2, 5, 7, 8, 37, 38, 39, 64, 65, 131)
_WHOLE: Final = 32  # up to so many, a kernel also gets all of the rows that are its most
_MOST_ROWS: Final = 1024  # a bound in a library from outside takes no more memory than this many rows
Cases = Callable[[Table, np.random.Generator], Iterator[Case]]
Fact = Mapping[str, Any]  # `kind`, and what its PrimFunc's attributes say


@dataclass(frozen=True)
class Role:
    """`kind` for people; `oracle` names what it is compared with; `cases` makes its arguments and results."""

    kind: str
    oracle: str
    cases: Cases


_ATTENTION: Final = {
    "batch_prefill_ragged_kv": attention.ragged_prefill,
    "batch_prefill_paged_kv": attention.paged_prefill,
    "batch_prefill_paged_kv_sliding_window": attention.paged_prefill,
    "attention_ragged_prefill": attention.tiled_ragged_prefill,
    "attention_paged_prefill": attention.tiled_paged_prefill,
    "attention_paged_decode": attention.paged_decode,
    "batch_decode_paged_kv_sliding_window": attention.sliding_decode,
    "batch_tree_attn": attention.ragged_tree,
    "tree_attn_paged_kv": attention.paged_tree,
}
_CACHE: Final[dict[str, Cases]] = {
    "tir_kv_cache_transpose_append": cache.append,
    "tir_kv_cache_transpose_append_mla": cache.append_mla,
    "tir_kv_cache_debug_get_kv": cache.debug_get_kv,
    "copy_single_page": cache.copy_single_page,
    "compact_kv_copy": cache.compact,
}
_OF_MODEL: Final = {"tir_attention_merge_state": cache.merge_state, "fused_rope": cache.split_rotary}
_ENGINE: Final[dict[str, Cases]] = {
    "apply_logit_bias_inplace": engine.logit_bias,
    "apply_penalty_inplace": engine.penalty,
    "apply_bitmask_inplace": engine.bitmask,
    "gather_probs": engine.move_rows,
    "scatter_probs": engine.move_rows,
    "gather_hidden_states": engine.move_rows,
    "scatter_hidden_states": engine.move_rows,
}
_SAMPLER: Final[dict[str, Cases]] = {
    "tir_multinomial_from_uniform": sampler.draw,
    "tir_argsort_probs": sampler.argsort,
    "tir_sample_with_top_p": sampler.draw_top_p,
    "tir_sampler_take_probs": sampler.take_probs,
    "tir_renormalize_by_top_p": sampler.renormalize,
    "sampler_verify_draft_tokens": sampler.verify_drafts,
}


_NAMES: Final = _ATTENTION.keys() | _OF_MODEL.keys() | _CACHE.keys() | _ENGINE.keys() | _SAMPLER.keys()


def roles(config: ModelConfig, scheme: QuantScheme, target: TargetSpec, options: CompileOptions) -> Mapping[str, Role]:
    """By name of PrimFunc, without a system library's prefix."""
    facts, others = facts_of(unscheduled(config, scheme, target, options), config)
    return roles_of(facts, build_references(others), config)


def unscheduled(config: ModelConfig, scheme: QuantScheme, target: TargetSpec, options: CompileOptions) -> Any:
    """The module whose PrimFuncs a library has."""
    parameters = tuple(model_parameters(config, scheme))
    return lowered_module(CompileContext(config, scheme, target, options, parameters, known_records()))


def facts_of(module: Any, config: ModelConfig) -> tuple[dict[str, Fact], dict[str, tuple[Any, int]]]:
    """Of a module as `compiler.lowered_module` gives it: facts, and what `build_references` takes."""
    from tvm import tirx

    facts: dict[str, Fact] = {}
    others: dict[str, tuple[Any, int]] = {}
    counts = _outputs(module)
    for var, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        name = str(function.attrs.get("global_symbol", var.name_hint))
        if (fact := _fact(name, function, config)) is not None:
            facts[name] = fact
        elif var in counts:
            facts[name] = {"kind": "other"}
            others[name] = (function, counts[var])
    return facts, others


def _fact(name: str, function: Any, config: ModelConfig) -> Fact | None:
    """None for a function that is known neither by its attributes nor by its name."""
    from awq_compile.kernels.embedding import EMBEDDING_TAG
    from awq_compile.kernels.linear import TAG
    from awq_compile.models.sampling import softmax_active

    if TAG in function.attrs:
        return {"kind": "linear", "problem": str(function.attrs[TAG])}
    if EMBEDDING_TAG in function.attrs:
        return {"kind": "embedding", "spec": str(function.attrs[EMBEDDING_TAG])}
    if name in _NAMES:
        return {"kind": "named"}
    if (active := softmax_active(name, config.vocab_size)) is not None:
        return {"kind": "softmax", "active": active}
    return None


def roles_of(facts: Mapping[str, Fact], references: Mapping[str, Reference], config: ModelConfig) -> dict[str, Role]:
    """By name of PrimFunc."""
    return {name: _role(name, fact, references, config) for name, fact in facts.items()}


def _role(name: str, fact: Fact, references: Mapping[str, Reference], config: ModelConfig) -> Role:
    match fact["kind"]:
        case "linear":
            problem = decode_problem(fact["problem"])
            return Role("linear", "float64", lambda table, rng: linear_cases(problem, _rows_of(table), rng, table))
        case "embedding":
            spec = _spec(fact["spec"])
            vocab, hidden = config.vocab_size, config.hidden_size
            return Role(
                "embedding",
                "float64",
                lambda table, rng: embedding_cases(spec, vocab, hidden, table["params"][-1]["dtype"], ROWS, rng),
            )
        case "named":
            return _named(name, config)
        case "softmax":
            active = fact["active"]
            return Role("engine", "float64", lambda table, rng: engine.softmax(table, rng, (1, 2, 7), active))
    reference = references[name]
    return Role("other", "LLVM", lambda table, rng: generic_cases(table, reference, rng))


def _rows_of(table: Table) -> tuple[int, ...]:
    """`ROWS`, one more than every bound between kernels, so that each of them runs, and lesser bounds themselves."""
    bounds = [bound for bound in bounds_of(table) if 0 < bound < _MOST_ROWS]
    whole = {bound for bound in bounds if bound <= _WHOLE}
    return tuple(sorted({*ROWS, *(bound + 1 for bound in bounds), *whole}))


def _named(name: str, config: ModelConfig) -> Role:
    if name in _ATTENTION:
        attend = _ATTENTION[name]
        return Role("attention", "float64", lambda table, rng: attend(table, rng, config.rope_scaling))
    if name in _OF_MODEL:
        of_model = _OF_MODEL[name]
        return Role("attention", "float64", lambda table, rng: of_model(table, rng, config))
    if name in _CACHE:
        return Role("kv cache", "exact", _CACHE[name])
    if name in _ENGINE:
        return Role("engine", "float64", _ENGINE[name])
    return Role("sampler", "float64", _SAMPLER[name])


def _spec(name: str) -> WeightSpec:
    return Float16Spec() if name == Float16Spec().name else QuantSpec.parse(name)


def _outputs(module: Any) -> dict[Any, int]:
    """Number of results of each PrimFunc that a Relax function calls: its arrays that are not arguments of the call."""
    from awq_compile.passes.base import bindings_of, called_op, relax_functions

    counts = {}
    for _, function in relax_functions(module):
        for binding in bindings_of(function):
            if called_op(binding.value) == "relax.call_tir":
                callee, arguments = binding.value.args[0], binding.value.args[1]
                arrays = [p for p in module[callee].params if hasattr(p.ty, "shape")]
                counts[callee] = len(arrays) - len(arguments.fields)
    return counts
