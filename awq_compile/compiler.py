"""The compiler on one page: from a model's configuration to a library. Needs no weights.

decoder → quantise → schedule → lower → VM → build → link
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq_compile.formats import QuantScheme, WeightSpec
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig
from awq_compile.models.parameters import Parameter, model_parameters
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import LinearSchedule
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.link import init_once_object
from awq_compile.tuning.database import ScheduleDatabase, known_records
from awq_compile.tuning.templates import describe_schedule


@dataclass(frozen=True)
class CompileContext:
    """What it resolves to, once; the passes take their options from here and look at nothing else."""

    config: ModelConfig
    scheme: QuantScheme
    target: TargetSpec
    options: CompileOptions
    parameters: tuple[Parameter, ...]
    database: ScheduleDatabase
    kernels: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # what was chosen, for the report

    @property
    def captured(self) -> tuple[str, ...]:
        """Functions whose kernels are replayed as CUDA graphs."""
        from awq_compile.models.decoder import DECODE_FUNCTIONS

        cuda = self.target.tvm_target["kind"] == "cuda"
        return DECODE_FUNCTIONS if cuda and self.options.cuda_graphs else ()

    @property
    def plan(self) -> Mapping[str, WeightSpec]:
        """Format of every matrix parameter."""
        return {p.name: p.spec for p in self.parameters if p.spec is not None}

    def choose(self, problem: MatmulProblem) -> LinearSchedule:
        """Measured schedules where the database has them, else the target's rule."""
        schedule, choices = self.database.choose_linear(self.target, problem)
        for bucket, choice in choices.items():
            self.kernels[problem.name, bucket] = {
                "kernel": problem.name,
                "rows": bucket,
                "schedule": describe_schedule(choice.schedule),
                "source": choice.words,
            }
        return schedule


@dataclass(frozen=True)
class CompileReport:
    """What was built. `parameters` are (name, shape, dtype) in the order that the library takes them."""

    target: str
    parameters: list[tuple[str, tuple[int, ...], str]]
    kernels: list[dict[str, Any]]
    memory_usage: dict[str, int]
    seconds: float
    library_bytes: int


def quantize_passes(context: CompileContext) -> list[Any]:
    """Matmuls read packed weights, with their epilogues inside and a schedule each."""
    from awq_compile.passes.apply_schedules import ApplySchedules
    from awq_compile.passes.fuse_epilogue import FuseEpilogue
    from awq_compile.passes.quantize_linears import QuantizeLinears
    from awq_compile.passes.verify_quantized import VerifyQuantized

    passes = (
        QuantizeLinears(context.plan, context.target.block_threads),
        FuseEpilogue(),
        ApplySchedules(context.choose),
        VerifyQuantized(context.plan),  # before lowering, while names still say what they are
    )
    return [p.as_tvm() for p in passes]


def lower_passes() -> list[Any]:
    """From operators to fused PrimFuncs: all that is not a quantised linear goes through TVM's own passes."""
    from tvm.relax import transform as t

    return [
        t.BundleModelParams("params"),  # one tuple, the same in every function, as the runtime passes it
        t.LegalizeOps(),
        t.AnnotateTIROpPattern(),
        t.FoldConstant(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(),
    ]


def device_passes() -> list[Any]:
    """Threads for every PrimFunc that has no schedule yet, by TVM's rules for GPUs."""
    from tvm.s_tir import dlight

    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    return [dlight.ApplyDefaultSchedule(*rules)]


def plan_passes(captured: tuple[str, ...] = ()) -> list[Any]:
    """From PrimFuncs to calls on planned memory; the functions `captured` replay them as CUDA graphs."""
    from tvm.relax import transform as t

    from awq_compile.passes.capture_graphs import CaptureGraphs

    return [
        t.RewriteDataflowReshape(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        *([CaptureGraphs(captured, sizes=("b",)).as_tvm()] if captured else []),
        t.LowerAllocTensor(),
    ]


def vm_passes() -> list[Any]:
    """From calls on planned memory to VM code."""
    from tvm.relax import transform as t

    return [
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


def compile_library(
    config: ModelConfig,
    scheme: QuantScheme,
    target: TargetSpec,
    options: CompileOptions,
    out: Path,
    *,
    dump: Path | None = None,
    database: ScheduleDatabase | None = None,
) -> CompileReport:
    """Compiles a model for a target and writes the library (or archive of objects) to `out`.

    A library with device code gets its launch tables beside it, see `verify.sidecar`. `dump` receives the IR
    after each pass. `database` is `known_records()` unless given. Raises `CompileError` when a check of the compiler
    fails.
    """
    import tvm
    from tvm import relax

    from awq_compile.models.kv_cache import attention_workspace_bytes
    from awq_compile.passes.capture_graphs import check_captured
    from awq_compile.passes.memory_usage import memory_usage
    from awq_compile.passes.prefix_symbols import PrefixSymbols
    from awq_compile.verify.record import LaunchRecorder
    from awq_compile.verify.sidecar import write_sidecar

    start = time.monotonic()
    target.check_scheme(scheme)
    parameters = tuple(model_parameters(config, scheme))
    records = known_records() if database is None else database
    context = CompileContext(config, scheme, target, options, parameters, records)
    tvm_target = tvm.target.Target(target.tvm_target)
    recorder = LaunchRecorder()
    instruments = [recorder.instrument(), *([_dump_instrument(dump)] if dump is not None else [])]
    # Common subexpressions are left to the compilers behind: TVM's pass doubles every line it finds.
    options_of_tvm = {"tirx.disable_cse_tir": True}
    with tvm_target, tvm.transform.PassContext(opt_level=3, instruments=instruments, config=options_of_tvm):
        module = lowered_module(context)
        if target.has_device_code:
            module = tvm.transform.Sequential(device_passes())(module)
        planned = tvm.transform.Sequential(plan_passes(context.captured))(module)
        memory = memory_usage(planned, attention=attention_workspace_bytes(config, target, options))
        planned["_metadata"] = _metadata_function(context, memory)
        final = tvm.transform.Sequential(vm_passes())(planned)
        if target.system_lib:
            prefix = system_lib_prefix(out)
            final = PrefixSymbols(prefix).as_tvm()(final).with_attr("system_lib_prefix", prefix)
        with target.building():
            executable = relax.build(final, target=tvm_target, relax_pipeline=None, system_lib=target.system_lib)
            check_captured(planned, recorder.tables)
            export_executable(executable, target, out)
    if target.has_device_code:
        write_sidecar(out, recorder.tables, executable.mod)
    return CompileReport(
        target=target.name,
        parameters=_arrays(parameters),
        kernels=[kernel for _, kernel in sorted(context.kernels.items())],
        memory_usage=memory,
        seconds=time.monotonic() - start,
        library_bytes=out.stat().st_size,
    )


def lowered_module(context: CompileContext) -> Any:
    """The model's PrimFuncs, quantised linears scheduled and all others not yet."""
    import tvm

    from awq_compile.models.decoder import export_decoder

    options, target = context.options, context.target
    module, _ = export_decoder(context.config, options, target.dtype, target)
    with tvm.target.Target(target.tvm_target):
        # Schedules are applied to a module of our own: TVM's rules change the one they are given.
        return tvm.transform.Sequential([*quantize_passes(context), *lower_passes()])(with_bounds(module, options))


def with_bounds(module: Any, options: CompileOptions) -> Any:
    """Upper bounds of the symbolic sizes, with which memory is planned once instead of at every call."""
    from awq_compile.passes.base import copy, relax_functions

    result = copy(module)
    bounds = {"n": options.prefill_chunk_size, "m": options.prefill_chunk_size, "b": options.max_batch_size}
    for var, function in relax_functions(module):
        result[var] = function.with_attr("tir_var_upper_bound", bounds)
    return result


def model_lib(library: Path) -> str:
    """MLC's `model_lib` of a static library, an app's name for it: its file name as an identifier of C."""
    name = re.sub(r"\W", "_", library.stem, flags=re.ASCII)
    # Kernels in C are called so, too, and TVM does not read an attribute of fewer than 8 characters.
    return f"model_{name}" if len(name) < 7 or name[0].isdigit() else name


def system_lib_prefix(library: Path) -> str:
    """Prefix of the symbols of a static library, as MLC's runtime looks them up."""
    return f"{model_lib(library)}_"


def _arrays(parameters: tuple[Parameter, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, shape, dtype) for p in parameters for name, (shape, dtype) in p.arrays().items()]


def _metadata_function(context: CompileContext, memory: dict[str, int]) -> Any:
    """`_metadata() -> str`, as `cpp/metadata/model.cc` of the MLC runtime reads it."""
    from tvm import relax
    from tvm.ir import StringImm

    config, options = context.config, context.options
    data = {
        "model_type": config.model_type,
        "active_vocab_size": config.active_vocab_size,
        "quantization": context.scheme.mlc_name,
        **options.runtime_keys(),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "model_task": "chat",
        "kv_state_kind": "kv_cache",
        "params": [
            {"name": name, "shape": list(shape), "dtype": dtype, "preprocs": [], "pipeline_stages": [0]}
            for name, shape, dtype in _arrays(context.parameters)
        ],
        "memory_usage": memory,
        "kv_cache": {
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "page_size": options.page_size,  # for our own runtime
        },
    }
    builder = relax.BlockBuilder()
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(StringImm(json.dumps(data, sort_keys=True)))
    return builder.get()["_metadata"]


def export_executable(executable: Any, target: TargetSpec, out: Path) -> None:
    """Writes the library under a temporary name, then renames it."""

    def write(path: str, objects: list[str], **_: Any) -> None:
        files = sorted(Path(o) for o in objects)
        if target.library_suffix == ".tar":
            if target.system_lib:
                files.append(init_once_object(target.host, Path(path).parent))
            _write_tar(Path(path), files)
        else:
            target.link(Path(path), files)

    # The linker is given the final name: on macOS it becomes part of the library.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        executable.export_library(str(Path(folder) / out.name), fcompile=write)
        (Path(folder) / out.name).replace(out)


def _write_tar(path: Path, files: list[Path]) -> None:
    """A tar without times, owners or folder names: equal objects give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for file in files:
            data = file.read_bytes()
            info = tarfile.TarInfo(file.name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _dump_instrument(folder: Path) -> Any:
    """A pass instrument that writes `NNN-Pass.py` with the module and its time after each pass."""
    import tvm

    folder.mkdir(parents=True, exist_ok=True)

    @tvm.instrument.pass_instrument
    class Dump:
        def __init__(self) -> None:
            self.count = 0
            self.started: list[float] = []

        def run_before_pass(self, _module: Any, _info: Any) -> None:
            self.started.append(time.monotonic())

        def run_after_pass(self, module: Any, info: Any) -> None:
            took = time.monotonic() - self.started.pop()
            name = f"{self.count:03d}-{str(info.name).rpartition('.')[2] or 'pass'}.py"
            (folder / name).write_text(f"# {took * 1e3:.1f} ms\n{module.script()}\n", encoding="utf-8")
            self.count += 1

    return Dump()
