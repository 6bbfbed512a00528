"""From a candidate to built code: one kernel, alone in a module, under the name `KERNEL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from awq_compile.kernels.build import bucket_linear
from awq_compile.kernels.linear import reference_linear
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.foreign import Candidate, Dlight, Trace
from awq_compile.tuning.measure import Work
from awq_compile.verify.launch_table import Table
from awq_compile.verify.record import LaunchRecorder

KERNEL: Final = "linear"


@dataclass(frozen=True)
class Built:
    """`module` holds the function `KERNEL`, which takes the arguments of `kernels.linear`.

    For device code, `table` says what its host code launches.
    """

    module: Any
    table: Table | None

    @property
    def source(self) -> str:
        """Of the device code, in its language."""
        return str(self.module.imports[0].inspect_source(""))


def prim_func(work: Work, candidate: Candidate, spec: TargetSpec, target: Any) -> Any:
    """The scheduled PrimFunc of a candidate. Ours take any M of the bucket, those by others M = `work.rows`."""
    if isinstance(candidate, Dlight):
        return _by_dlight(work, spec, target)
    if isinstance(candidate, Trace):
        return _by_trace(work, candidate)
    return bucket_linear(work.problem, work.bucket, candidate)


def build(work: Work, candidate: Candidate, spec: TargetSpec) -> Built:
    """Builds as the compiler does. Raises what TVM raises."""
    import tvm

    target = tvm.target.Target(spec.tvm_target)
    function = prim_func(work, candidate, spec, target).with_attr("global_symbol", KERNEL)
    recorder = LaunchRecorder()
    options = {"tirx.disable_cse_tir": True}
    context = tvm.transform.PassContext(opt_level=3, instruments=[recorder.instrument()], config=options)
    with target, context, spec.building():
        module = tvm.tirx.build(tvm.IRModule({KERNEL: function}), target=target)
    return Built(module, recorder.tables[KERNEL] if spec.has_device_code else None)


def _by_dlight(work: Work, spec: TargetSpec, target: Any) -> Any:
    """What every kernel without a schedule of ours gets. On CPUs dlight knows GEMVs only, and leaves the rest as is."""
    import tvm
    from tvm.s_tir import dlight

    from awq_compile.compiler import device_passes

    passes = device_passes() if spec.has_device_code else [dlight.ApplyDefaultSchedule(dlight.cpu.GEMV())]
    with target:
        module = tvm.IRModule({KERNEL: reference_linear(work.problem, work.rows)})
        return tvm.transform.Sequential(passes)(module)[KERNEL]


def _by_trace(work: Work, candidate: Trace) -> Any:
    """The reference with a recorded trace applied."""
    import json

    import tvm
    from tvm.s_tir import schedule as tir

    function = reference_linear(work.problem, work.rows).with_attr("global_symbol", "main")
    schedule = tir.Schedule(tvm.IRModule({"main": function}))
    tir.Trace.apply_json_to_schedule(json.loads(candidate.trace), schedule)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
