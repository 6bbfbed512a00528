"""Kernels of linears as machine code with their launch tables, for a GPU elsewhere: what the scripts share that build.

A bundle is a folder with `linears.json` and `<i>.cubin`, see `bundle_cuda_linears`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from awq_compile.kernels.build import bucket_linear
from awq_compile.problem import MatmulProblem, encode_problem
from awq_compile.targets import resolve_target
from awq_compile.targets.cuda import CudaTarget
from awq_compile.targets.cuda_launch import overlapping_kernels, with_waits
from awq_compile.verify.record import LaunchRecorder

OURS = {"tirx.disable_cse_tir": True}  # of a pass context, as the compiler and MLC have it


@dataclass(frozen=True)
class Job:
    """One kernel: whose it is called, and from how many rows on it serves."""

    by: str
    first: int
    problem: MatmulProblem
    bucket: str
    schedule: Any


def built(function: Any, name: str, target: Any, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(launch table, CUDA C++ as TVM makes it) of a PrimFunc."""
    recorder = LaunchRecorder()
    with tvm.transform.PassContext(instruments=[recorder.instrument()], config=config):
        module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
        made = tvm.tirx.build(module, target=target)
    return recorder.tables[name], made.imports[0].inspect_source("cuda")


def write_bundle(folder: Path, arch: str, jobs: Sequence[Job]) -> None:
    """Compiles kernels on all cores."""
    folder.mkdir(parents=True)
    paths, archs = [folder / f"{i}.cubin" for i in range(len(jobs))], [arch] * len(jobs)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        entries = list(pool.map(_compiled, jobs, paths, archs, chunksize=4))
    (folder / "linears.json").write_text(json.dumps({"arch": arch, "linears": entries}))
    print(f"{len(jobs)} kernels")


def _compiled(job: Job, path: Path, arch: str) -> dict[str, Any]:
    """The entry of a kernel, its machine code written."""
    target, problem = resolve_target(f"cuda:{arch}"), job.problem
    assert isinstance(target, CudaTarget)
    with tvm.target.Target(target.tvm_target) as tvm_target:
        table, source = built(bucket_linear(problem, job.bucket, job.schedule), problem.name, tvm_target, OURS)
    source = with_waits(source)
    path.write_bytes(target.machine_code(source)[0])
    found = {"by": job.by, "from": job.first, "problem": encode_problem(problem), "table": table}
    return found | {"overlapping": sorted(overlapping_kernels(source, arch))}
