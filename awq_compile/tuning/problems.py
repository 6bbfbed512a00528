"""The kernels of a model that can be tuned, each with its share of a decode step and of a prefill.

They are read from the module that the compiler's own passes make, of the model with one layer and with two: a
layer's problems are those that occur more often in the second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.models.parameters import model_parameters
from awq_compile.problem import MatmulProblem, decode_problem, serves
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.cost import roofline_seconds
from awq_compile.tuning.database import ScheduleDatabase
from awq_compile.tuning.measure import Work, rows_of

_BATCHES: Final = dict.fromkeys(("pair", "quad", "small", "medium", "broad", "large"), "batch_decode")
_STEPS: Final = {"gemv": "decode", **_BATCHES, "wide": "prefill", "gemm": "prefill"}


@dataclass(frozen=True)
class Share:
    """A work and what it takes, by the roofline, of one step of decoding (of a batch, from `pair` to `large`) or of
    one prefill: `calls` a step, and `share` of the time of all linears of that step.
    """

    work: Work
    calls: int
    share: float


def model_works(
    config: ModelConfig, scheme: QuantScheme, target: TargetSpec, options: CompileOptions, roof: Roof
) -> list[Share]:
    """Every bucket that the model uses of every distinct problem, largest share first within a bucket."""
    one, two = (_calls(replace(config, num_layers=layers), scheme, target, options) for layers in (1, 2))
    found = []
    for bucket, step in _STEPS.items():
        calls: Counter[Work] = Counter()
        for (function, problem, fixed), count in two.items():
            rule = target.rule(problem)
            if function != step or bucket not in rule.by_bucket:
                continue
            rows = rows_of(bucket, rule)
            in_layer = count - one[function, problem, fixed]
            total = count + in_layer * (config.num_layers - 2)
            # What a prefill does to the last token only is a GEMV, and counts with those of a decode step.
            if serves(bucket, fixed or rows):
                calls[Work(problem, bucket, rows)] += total
        seconds = {work: count * roofline_seconds(work.problem, work.rows, roof) for work, count in calls.items()}
        whole = sum(seconds.values())
        found += [Share(work, calls[work], seconds[work] / whole) for work in sorted(calls, key=lambda w: -seconds[w])]
    return found


def _calls(
    config: ModelConfig, scheme: QuantScheme, target: TargetSpec, options: CompileOptions
) -> Counter[tuple[str, MatmulProblem, int | None]]:
    """(function, problem, rows, None where they vary) → calls in one step."""
    import tvm

    from awq_compile.compiler import CompileContext, quantize_passes
    from awq_compile.kernels.linear import TAG
    from awq_compile.models.decoder import export_decoder
    from awq_compile.passes.base import bindings_of, called_prim_func, relax_functions

    tvm_target = tvm.target.Target(target.tvm_target)
    parameters = tuple(model_parameters(config, scheme))
    context = CompileContext(config, scheme, target, options, parameters, ScheduleDatabase())
    module, _ = export_decoder(config, options, target.dtype)  # with a CPU's KV cache: its kernels take no part
    with tvm_target:
        module = tvm.transform.Sequential(quantize_passes(context))(module)
    calls: Counter[tuple[str, MatmulProblem, int | None]] = Counter()
    for var, function in relax_functions(module):
        name = str(var.name_hint)
        for binding in bindings_of(function) if name in _STEPS.values() else ():
            if (called := called_prim_func(module, binding.value, TAG)) is not None:
                rows = binding.value.args[1].fields[0].ty.shape[0]  # a constant, or a variable
                fixed = int(rows) if hasattr(rows, "value") else None
                calls[name, decode_problem(str(called.attrs[TAG])), fixed] += 1
    return calls
