"""Bundles: compiled candidates and a script (`far`) for a machine that cannot be reached, and its results.

    DIR/bundle.json    works, candidates, how long to measure
    DIR/measure.py     needs TVM's runtime only
    DIR/arrays/…       arrays, each once and named by its contents, and of what repeats along an axis the first part
    DIR/w0/…           libraries of a work

Results are JSON lines, read as from a stranger: a header that names target and versions, then what was found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np

from awq_compile.artifact import disk_errors
from awq_compile.errors import AwqCompileError, CompileError, UsageError
from awq_compile.json_input import parse_json
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import nominal_roof
from awq_compile.tuning.cost import ranked
from awq_compile.tuning.database import ScheduleDatabase
from awq_compile.tuning.export import Builds, export_kernel, kernel_suffix
from awq_compile.tuning.inputs import PERIOD, ROWS_PERIOD, make_inputs
from awq_compile.tuning.measure import FINAL, SEARCH, Measurement, Plan, Work
from awq_compile.tuning.record import Record, parse_problem, parse_record, tvm_version
from awq_compile.tuning.search import different
from awq_compile.tuning.space import space_of, why_illegal
from awq_compile.tuning.templates import VERSIONS, Schedule, encode_schedule
from awq_compile.tuning.tune import first_schedules, make_record

_MOST_BYTES: Final = 64 << 20  # of results
_HEADER: Final = {"bundle", "target", "tvm", "templates"}
_KINDS: Final = ("llvm", "cuda", "opencl", "vulkan", "metal")


def write_bundle(
    folder: Path,
    works: Sequence[Work],
    spec: TargetSpec,
    database: ScheduleDatabase,
    *,
    trials: int,
    seed: int = 0,
    jobs: int = 1,
    search: Plan = SEARCH,
    final: Plan = FINAL,
    builds: Builds | None = None,
    on_work: Callable[[Work, int], None] = lambda _work, _count: None,
) -> int:
    """Writes `folder` whole or not at all, with up to `trials` candidates of each work; returns how many.

    The first of a work is the target's untuned schedule; then those of similar problems and the analytical ranking.
    With several `jobs`, as many processes compile; with `builds` all is built elsewhere, at once.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists", hint="choose another folder for the bundle")
    suffix, kind = kernel_suffix(spec), str(spec.tvm_target["kind"])
    if kind not in _KINDS:
        raise UsageError(f"bundles are not made for {spec.name}")
    unfinished, count = folder.with_name(f".{folder.name}.{os.getpid()}"), 0
    with disk_errors(folder), ExitStack() as stack:
        run: Callable[..., Any] = map
        if jobs > 1 and builds is None:
            run = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"))).map
        try:
            (unfinished / "arrays").mkdir(parents=True)
            described = []
            candidates = [candidates_of(work, spec, database, trials) for work in works]
            if builds is not None:
                builds.begin([(w, s) for w, each in zip(works, candidates, strict=True) for s in each], search.limit)
            for at, (work, schedules) in enumerate(zip(works, candidates, strict=True)):
                (unfinished / f"w{at}").mkdir()
                paths = [f"w{at}/{i}{suffix}" for i in range(len(schedules))]
                whole = [unfinished / path for path in paths]
                export = partial(_export, work, spec) if builds is None else partial(_take, work, builds)
                errors = run(export, schedules, whole)
                found = _arrays(unfinished, work, seed) | {
                    "candidates": [
                        {"schedule": encode_schedule(schedule)} | ({"error": error} if error else {"file": path})
                        for schedule, path, error in zip(schedules, paths, errors, strict=True)
                    ]
                }
                described.append(found)
                count += len(found["candidates"])
                on_work(work, count)
            head = {"target": spec.name, "tvm": tvm_version(), "templates": VERSIONS, "kind": kind}
            body = head | {
                "machine": spec.machine,
                "search": asdict(search),
                "final": asdict(final),
                "works": described,
            }
            digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
            (unfinished / "bundle.json").write_text(json.dumps({"bundle": digest} | body), encoding="utf-8")
            script = (files("awq_compile.tuning") / "far.py").read_text(encoding="utf-8")
            (unfinished / "measure.py").write_text(script, encoding="utf-8")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return count


def candidates_of(work: Work, spec: TargetSpec, database: ScheduleDatabase, trials: int) -> list[Schedule]:
    """What is measured of a work where nothing can be searched for: the first of what a search would begin with."""
    space, rule = space_of(work.problem, work.bucket, spec), spec.rule(work.problem).of(work.bucket)
    ranking = ranked(work.problem, work.rows, spec, space.members, nominal_roof(spec.name))
    first = first_schedules(space, rule, database)
    return list(dict.fromkeys([*first, *different(space, ranking), *ranking]))[:trials]


def _export(work: Work, spec: TargetSpec, schedule: Schedule, path: Path) -> str:
    """Why a candidate has no file; empty where it has one."""
    try:
        export_kernel(work, schedule, spec, path)
    except Exception as error:  # TVM raises what it likes
        return f"{type(error).__name__}: {error}"[:400]
    return ""


def _take(work: Work, builds: Builds, schedule: Schedule, path: Path) -> str:
    """`_export` of what is built elsewhere."""
    found = builds.library(work, schedule)
    if isinstance(found, Measurement):
        return found.error
    shutil.move(found, path)
    return ""


def _arrays(folder: Path, work: Work, seed: int) -> dict[str, Any]:
    """Writes what a work's candidates are run with and must compute; returns the work's description."""
    inputs = make_inputs(work, seed)
    given = [inputs.x, *inputs.weight, *inputs.extra]
    results = [inputs.output(), inputs.expected, inputs.bound]
    return {
        "problem": asdict(work.problem),
        "bucket": work.bucket,
        "rows": work.rows,
        "arrays": [_keep(folder, array) for array in given],
        "expected": [_keep(folder, array) for array in results],
    }


def _keep(folder: Path, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Writes an array unless an equal one is there. `shape` is the whole one's, over which the stored one repeats."""
    stored = array
    for axis, length in enumerate(array.shape):
        for period in (1, ROWS_PERIOD, PERIOD):
            if period < length and np.array_equal(stored, stored.take(np.arange(length) % period, axis)):
                stored = stored.take(np.arange(period), axis)
                break
    stored = np.ascontiguousarray(stored)
    digest = hashlib.sha256(f"{stored.shape} {stored.dtype}".encode() + stored.tobytes()).hexdigest()
    name = f"arrays/{digest[:16]}.npy"
    if not (folder / name).exists():
        np.save(folder / name, stored, allow_pickle=False)
    return {"file": name, "shape": list(array.shape)}


@dataclass(frozen=True)
class Results:
    """`records` of the works that were measured to the end; `statuses` of all candidates; `notes`: what was skipped."""

    target: str
    records: list[Record]
    statuses: Counter[str]
    notes: list[str]


def read_results(path: Path) -> Results:
    """Takes what a bundle's script wrote. Raises `CompileError` naming file and line for what does not fit."""
    from awq_compile.targets import resolve_target

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CompileError(f"{path}: {path.stat().st_size} bytes, and at most {_MOST_BYTES} are read")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CompileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CompileError(f"{path} is not text: results of a bundle are JSON lines") from None
    found: dict[Work, list[Measurement]] = {}
    final: dict[Work, list[Measurement]] = {}
    line_number = 1
    try:
        head = _object(lines[0] if lines else "")
        if set(head) != _HEADER or not isinstance(head["target"], str):
            raise CompileError(f"no results of a bundle: the first line has the keys {', '.join(head) or 'none'}"[:300])
        spec = resolve_target(head["target"])
        if (head["tvm"], head["templates"]) != (tvm_version(), VERSIONS):
            raise CompileError(
                f"measured with TVM {head['tvm']!s:.40} and templates {head['templates']!s:.200}, and here are "
                f"{tvm_version()} and {VERSIONS}"
            )
        for line in lines[1:]:
            line_number += 1
            data = _object(line)
            work = _work(data)
            if "final" in data:
                final[work] = [_measurement(each, work, spec) for each in _list(data["final"])]
            else:
                found.setdefault(work, []).append(_measurement(data.get("found"), work, spec))
        notes = [f"{path}: {work.name} was not measured to the end" for work in found if work not in final]
        records = []
        for work, (untuned, *finalists) in final.items():
            if untuned.schedule != spec.rule(work.problem).of(work.bucket):
                raise CompileError(f"{work.name}: the first of the last measurements is not the untuned schedule")
            if not any(m.status == "ok" for m in (untuned, *finalists)):
                notes.append(f"{path}: {work.name}: nothing gives the right result there: {untuned.error}")
                continue
            trials = max(1, len(found.get(work, ())))
            roof = nominal_roof(spec.name)
            record = make_record(work, spec, roof, untuned, finalists, trials)
            records.append(parse_record(record.line()))
    except AwqCompileError as error:
        raise CompileError(f"{path}:{line_number}: {error}", hint=error.hint) from None
    return Results(spec.name, records, Counter(m.status for each in found.values() for m in each), notes)


def _object(line: str) -> dict[str, Any]:
    try:
        data = parse_json(line)
    except ValueError as error:
        raise CompileError(str(error)) from None
    if not isinstance(data, dict):
        raise CompileError(f"a JSON object is expected, found {type(data).__name__}")
    return data


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise CompileError(f"measurements are expected, found {data!r:.60}")
    return data


def _work(data: dict[str, Any]) -> Work:
    bucket, rows = data.get("bucket"), data.get("rows")
    if not isinstance(bucket, str) or type(rows) is not int or not 0 < rows <= 1 << 16:
        raise CompileError(f"{rows!r:.40} rows in the bucket {bucket!r:.40}")
    return Work(parse_problem(data), bucket, rows)


def _measurement(data: Any, work: Work, spec: TargetSpec) -> Measurement:
    if not isinstance(data, dict):
        raise CompileError(f"a measurement is expected, found {data!r:.60}")
    found = Measurement.from_json(data)
    rule = spec.rule(work.problem).of(work.bucket)
    reason = None if found.schedule == rule else why_illegal(work.problem, work.bucket, spec, found.schedule)  # type: ignore[arg-type]
    if reason:
        raise CompileError(f"{work.name}: a schedule that {spec.name} does not have: {reason}")
    return replace(found, error=found.error[:400])
