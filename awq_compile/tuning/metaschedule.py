"""TVM's MetaSchedule on the same problems, for comparison: its own space and evolutionary search, our measurements.

Its candidates are traces of schedule primitives over the unscheduled reference at fixed M. They are built and run by
a `Measurer`, like ours: MetaSchedule's own builder starts a process for each batch, which imports TVM's tensor
intrinsics for half a minute and then times out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.kernels.linear import reference_linear
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.foreign import Candidate, Trace
from awq_compile.tuning.measure import Measurement, Measurer, Plan, Work

_BATCH: Final = 32  # candidates between two updates of its cost model
_FAILED_SECONDS: Final = 1e10  # what MetaSchedule's own runner reports for a candidate without a time


def metaschedule(
    measurer: Measurer,
    work: Work,
    spec: TargetSpec,
    plan: Plan,
    *,
    trials: int,
    seconds: float,
    seed: int,
    on_trial: Callable[[Measurement, float], None] = lambda _measurement, _elapsed: None,
) -> list[Measurement]:
    """Everything it measured, in order, until `trials` or `seconds` are spent; `on_trial` also gets the time since
    the start. Raises `EnvironmentMissingError` without xgboost, which its cost model needs, and `CompileError` for a
    problem that it cannot schedule.
    """
    try:
        import xgboost  # noqa: F401
    except ModuleNotFoundError:
        raise EnvironmentMissingError(
            "the Python package 'xgboost' is missing, which MetaSchedule's cost model needs",
            hint="pip install awq-compile[metaschedule]",
        ) from None
    import tvm
    import tvm.s_tir.tensor_intrin  # half a minute, which is not the search's
    from tvm.s_tir import meta_schedule as ms

    start = time.monotonic()
    target = tvm.target.Target({**spec.tvm_target, "num-cores": measurer.fingerprint().units})
    module = tvm.IRModule({"main": reference_linear(work.problem, work.rows).with_attr("global_symbol", "main")})
    context = ms.TuneContext(
        module,
        target=target,
        space_generator="post-order-apply",
        search_strategy="evolutionary",
        rand_state=seed + 1,
        num_threads=measurer.fingerprint().units,
    )
    database, model = ms.database.MemoryDatabase(), ms.cost_model.XGBModel(num_warmup_samples=_BATCH)
    workload = database.commit_workload(module)
    try:
        context.pre_tuning(trials, min(_BATCH, trials), database=database, cost_model=model)
    except (RuntimeError, ValueError) as error:  # its rules do not take an epilogue that reads two columns
        said = str(error).strip().splitlines()[-1]
        raise CompileError(f"MetaSchedule cannot make a space for {work.name}: {said}") from None
    found: list[Measurement] = []
    while len(found) < trials and time.monotonic() - start < seconds:
        candidates = context.generate_measure_candidates()
        if not candidates:
            break
        traces = [Trace(json.dumps(_plain(c.sch.trace.as_json(remove_postproc=False)))) for c in candidates]
        measured: dict[Candidate, float] = {}
        for measurement in measurer.measure(work, list(dict.fromkeys(traces)), plan):
            found.append(measurement)
            on_trial(measurement, time.monotonic() - start)
            measured[measurement.schedule] = min(measurement.seconds, _FAILED_SECONDS)
        answers = []
        for candidate, trace in zip(candidates, traces, strict=True):
            seconds_of_run = [measured[trace]]
            answers.append(ms.runner.RunnerResult(run_secs=seconds_of_run, error_msg=None))
            kept = candidate.sch.trace.simplified(remove_postproc=True)
            record = ms.database.TuningRecord(kept, workload, seconds_of_run, target, candidate.args_info)
            database.commit_tuning_record(record)
        model.update(context, candidates, answers)
        context.notify_runner_results(candidates, answers)
    context.post_tuning()
    return found


def _plain(value: Any) -> Any:
    """TVM's arrays, strings and numbers as Python's."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "value"):
        return value.value
    return {str(k): _plain(v) for k, v in value.items()} if hasattr(value, "items") else [_plain(v) for v in value]
