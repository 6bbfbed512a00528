"""Records are found exactly, then nearby, then not; files merge in any order, and damage stays in its line."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from awq_compile.cli.main import main
from awq_compile.errors import CompileError
from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import GemmSchedule, SimtGemvSchedule
from awq_compile.targets import resolve_target
from awq_compile.tuning.database import (
    ScheduleDatabase,
    add_records,
    known_records,
    merge,
    preset_restriction,
    read_records,
    write_records,
)
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.record import Key, Record, parse_record, tvm_version
from awq_compile.tuning.templates import VERSIONS

SPEC = resolve_target("opencl")
PROBLEM = MatmulProblem(1024, 2048, QuantSpec(4, 128), dtype="float16")
GEMV = SimtGemvSchedule(16, 8, 2, 16)


def record(**changes: Any) -> Record:
    """Of `PROBLEM` at M = 1 on a GPU."""
    values: dict[str, Any] = {
        "machine": SPEC.machine,
        "preset": "",
        "problem": PROBLEM,
        "bucket": "gemv",
        "rows": 1,
        "schedule": GEMV,
        "template_version": VERSIONS["simt_gemv"],
        "tvm": tvm_version(),
        "device": Fingerprint("GPU", "gpu", "1.0", 8),
        "seconds": 1e-4,
        "low": 9e-5,
        "high": 1.1e-4,
        "untuned_seconds": 2e-4,
        "roofline_seconds": 5e-5,
        "trials": 64,
        "runner_up": replace(GEMV, rows=4),
        "runner_up_seconds": 1.2e-4,
    }
    return Record(**values | changes)


def rule(problem: MatmulProblem = PROBLEM, bucket: str = "gemv") -> Any:
    return SPEC.rule(problem).of(bucket)


def test_exact_then_nearest_then_rule() -> None:
    """The nearest problem of the same kind gives its schedule, and nothing of another kind does."""
    near = record(problem=replace(PROBLEM, n=4096), schedule=replace(GEMV, rows=4))
    far = record(problem=replace(PROBLEM, n=1 << 20), schedule=replace(GEMV, rows=8))
    database = ScheduleDatabase((record(), near, far))
    assert database.choose(SPEC, PROBLEM, "gemv", rule()).words == "tuned"
    between = replace(PROBLEM, n=3000)
    choice = database.choose(SPEC, between, "gemv", rule(between))
    assert (choice.source, choice.schedule) == ("nearest", near.schedule)
    assert choice.words == f"nearest: {near.problem.name}"
    for other in (
        replace(PROBLEM, spec=QuantSpec(4, 32)),
        replace(PROBLEM, dtype="float32"),
        replace(PROBLEM, epilogue=Epilogue(activation="silu_mul")),
        replace(PROBLEM, n=1 << 16),  # too far from all
    ):
        assert database.choose(SPEC, other, "gemv", rule(other)).source == "rule"
    assert database.choose(SPEC, PROBLEM, "small", rule(bucket="small")).source == "rule"
    biased = replace(PROBLEM, epilogue=Epilogue(bias=True))
    assert database.choose(SPEC, biased, "gemv", rule(biased)).source == "nearest"
    _, choices = database.choose_linear(SPEC, PROBLEM)
    assert {bucket: choice.source for bucket, choice in choices.items()} == {
        "gemv": "tuned",
        "small": "rule",
        "gemm": "rule",
    }


def test_a_neighbour_whose_rule_was_the_fastest_speaks_for_the_rule() -> None:
    """And so does a record of a template that is no longer the rule's."""
    near, far = replace(PROBLEM, n=2048), replace(PROBLEM, n=4096)
    kept, other = record(problem=near, schedule=rule(near)), record(problem=far, schedule=replace(GEMV, rows=8))
    assert ScheduleDatabase((other,)).choose(SPEC, PROBLEM, "gemv", rule()).source == "nearest"
    assert ScheduleDatabase((kept, other)).choose(SPEC, PROBLEM, "gemv", rule()).source == "rule"
    float16 = MatmulProblem(32000, 2048, Float16Spec(), dtype="float16")
    cuda = resolve_target("cuda:sm_90")
    old = record(machine=cuda.machine, problem=float16)
    for problem in (float16, replace(float16, n=16000)):
        assert ScheduleDatabase((old,)).choose(cuda, problem, "gemv", cuda.rule(problem).gemv).source == "rule"


@pytest.mark.parametrize(
    ("n", "k", "epilogue"),
    [
        (6144, 4096, Epilogue()),
        (4096, 4096, Epilogue(residual=True)),
        (14336, 4096, Epilogue(activation="silu_mul")),
        (4096, 14336, Epilogue(residual=True)),
        (8192, 8192, Epilogue()),
        (28672, 8192, Epilogue()),
    ],
    ids=str,
)
def test_what_was_measured_on_an_h200_is_what_is_built(n: int, k: int, epilogue: Epilogue) -> None:
    """Where a problem that was measured has no record, its rule was changed to what had been found."""
    cuda = resolve_target("cuda:sm_90")
    _, choices = known_records().choose_linear(cuda, MatmulProblem(n, k, QuantSpec(4, 128), epilogue, "float16"))
    assert {bucket: choice.words for bucket, choice in choices.items() if choice.source == "nearest"} == {}


def test_a_neighbour_is_fitted_or_left() -> None:
    """Tiles shrink with the problem; a schedule that is illegal there is not taken, and the next neighbour is."""
    cpu = resolve_target("cpu:x86_64-linux-gnu")
    big = MatmulProblem(64, 512, QuantSpec(4, 128))
    wide = GemmSchedule(8, 4, 4, 256, 64)
    gemm = record(machine=cpu.machine, problem=big, bucket="gemm", rows=128, schedule=wide, runner_up=None)
    small = replace(big, n=24)
    choice = ScheduleDatabase((gemm,)).choose(cpu, small, "gemm", cpu.rule(small).gemm)
    assert choice.source == "nearest" and choice.schedule == replace(wide, n_vectors=3)
    deep = record(problem=replace(PROBLEM, n=1000), schedule=SimtGemvSchedule(128, 1, 2, 32))
    other = record(problem=replace(PROBLEM, n=900))
    short = replace(PROBLEM, k=1024)  # 128 threads of 32 weights are more than K
    found = ScheduleDatabase((deep, other)).choose(SPEC, short, "gemv", rule(short))
    assert found.record == other


def test_a_cpu_run_of_a_gpu_target_serves_that_target_only() -> None:
    """`android:generic` has the limits of `opencl`, and what Intel's CPU runtime likes says nothing about a phone."""
    phone = resolve_target("android:generic")
    assert phone.machine == SPEC.machine
    assert preset_restriction(SPEC, "cpu") == "opencl" and preset_restriction(SPEC, "gpu") == ""
    assert preset_restriction(resolve_target("cpu:x86_64-linux-gnu"), "cpu") == ""
    on_cpu = ScheduleDatabase((record(preset="opencl"),))
    windows = resolve_target("opencl@x86_64-windows-gnu")
    assert on_cpu.choose(windows, PROBLEM, "gemv", rule()).source == "tuned"
    for problem in (PROBLEM, replace(PROBLEM, n=1200)):
        assert on_cpu.choose(phone, problem, "gemv", rule(problem)).source == "rule"
    assert ScheduleDatabase((record(),)).choose(phone, PROBLEM, "gemv", rule()).source == "tuned"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine", "other"),
        ("preset", "opencl"),
        ("problem", replace(PROBLEM, k=4096)),
        ("bucket", "small"),
        ("schedule", GemmSchedule(8, 4, 4, 256, 64)),  # another template
        ("template_version", 99),
        ("tvm", "0.99"),
    ],
)
def test_every_part_of_the_key_counts(field: str, value: Any) -> None:
    """A record that differs in one of them is another record."""
    assert record(**{field: value}).key != record().key
    assert len({f.name for f in fields(Key)}) == 7


def test_later_files_win_and_other_versions_are_counted(tmp_path: Path) -> None:
    """A user's file comes after the shipped ones; a record of another template version or TVM is not used."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_records(first, [record(), record(template_version=99), record(tvm="0.1", bucket="small", rows=4)])
    write_records(second, [record(schedule=replace(GEMV, rows=8))])
    database = ScheduleDatabase.load([first, second])
    choice = database.choose(SPEC, PROBLEM, "gemv", rule())
    assert choice.schedule == replace(GEMV, rows=8)
    assert database.notes == (f"{first}: 2 records of another version of their template or of TVM are not used",)


def test_merging_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """The faster of two results of one device wins, devices keep their own, and the file is sorted, one a line."""
    faster, elsewhere = record(seconds=5e-5), record(device=Fingerprint("Other", "gpu", "1.0", 8))
    smaller = record(problem=replace(PROBLEM, n=64))
    expected = merge([record(), faster, elsewhere, smaller])
    assert sorted(r.seconds for r in expected) == [5e-5, 1e-4, 1e-4]
    for order in itertools.permutations([record(), faster, elsewhere, smaller]):
        assert merge(order) == expected
    write_records(tmp_path / "x.jsonl", expected)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert lines == sorted(lines) and len(lines) == 3
    assert read_records(tmp_path / "x.jsonl") == (expected, [])
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]  # nothing half-written stays


def test_adding_replaces_the_former_result(tmp_path: Path) -> None:
    """Tuning again overwrites its own record, slower or not, and no other."""
    path = tmp_path / "folder" / "x.jsonl"
    other = record(problem=replace(PROBLEM, n=64))
    add_records(path, [record(), other])
    add_records(path, [record(seconds=2e-4)])
    assert sorted(r.seconds for r in read_records(path)[0]) == [1e-4, 2e-4]


def test_nothing_is_lost_where_two_add_at_once(tmp_path: Path) -> None:
    """Each reads the file, adds its own and writes it: one after the other."""
    path, sizes = tmp_path / "x.jsonl", range(64, 64 + 24)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(add_records, path, [record(problem=replace(PROBLEM, n=n))]) for n in sizes]:
            done.result()
    assert sorted(r.problem.n for r in read_records(path)[0]) == list(sizes)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "\ufffe",
        {"bucket": "x"},
        {"bucket": "gemm"},
        {"rows": 9},
        {"rows": 1.0},
        {"seconds": -1},
        {"seconds": "1"},
        {"seconds": float("nan")},
        {"seconds": 10**400},
        {"seconds": 1e300},
        {"low": 5e-324},
        {"trials": True},
        {"schedule": {"template": "simt_gemv"}},
        {"schedule": []},
        {"problem": {"n": 1}},
        {"problem": {"n": 1 << 40, "k": 128}},
        {"device": {"name": "x"}},
        {"machine": "x" * 1000},
        {"machine": "x/../../../evil"},
        {"machine": "x\\evil"},
        {"preset": "/x/y"},
        {"preset": "a b"},
        {"tvm": "0.1\n"},
        {"device": {"name": "\ud800", "kind": "gpu", "driver": "1", "units": 8}},
        {"device": {"name": "\x1b[2J", "kind": "gpu", "driver": "1", "units": 8}},
        {"command": "rm"},
        {"runner_up": 1},
    ],
)
def test_a_damaged_line_is_skipped_and_named(tmp_path: Path, damage: str | dict[str, Any]) -> None:
    """File and line; the lines around it are read."""
    good = record().line()
    bad = damage if isinstance(damage, str) else json.dumps(json.loads(good) | damage)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{record(bucket='small', rows=2).line()}\n", encoding="utf-8", errors="replace")
    records, notes = read_records(path)
    assert len(records) == 2
    (note,) = notes
    assert note.startswith(f"{path}:3: skipped, not a record: ")


@pytest.mark.parametrize("changes", [{"machine": "x/../../../../evil"}, {"preset": "/x/y"}])
def test_no_line_leads_out_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, str]
) -> None:
    """What `tune --merge` writes is named after the records' words, and a path is not one of them."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path / "deep" / "cache"))
    (tmp_path / "in.jsonl").write_text(json.dumps(json.loads(record().line()) | changes) + "\n")
    main(["tune", "--merge", str(tmp_path / "in.jsonl")])
    assert f"{tmp_path / 'in.jsonl'}:1: skipped, not a record: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*.jsonl")] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k", 100),
        ("dtype", "int8"),
        ("epilogue", {"bias": 1}),
        ("epilogue", {"activation": "x"}),
        ("spec", {"bits": 5}),
    ],
)
def test_damaged_problems_are_refused(key: str, value: Any) -> None:
    """Sizes that the format does not have, types, activations and widths that do not exist."""
    data = json.loads(record().line())
    data["problem"][key] = {**data["problem"][key], **value} if isinstance(value, dict) else value
    with pytest.raises(CompileError):
        parse_record(json.dumps(data))


def test_lines_keep_records() -> None:
    """A line gives the record back, and records are equal when their lines are."""
    for found in (record(), record(runner_up=None, runner_up_seconds=None), record(preset="opencl")):
        assert parse_record(found.line()) == found


def test_the_users_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the cache; files that do not end in .jsonl are not records."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path))
    write_records(tmp_path / "tuned" / "x.jsonl", [record()])
    (tmp_path / "tuned" / "notes.txt").write_text("{")
    (tmp_path / "tuned" / ".x.jsonl.1").write_text("{")
    database = known_records()
    assert record() in database.records and not database.notes


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A file that the user names and that is not there is no empty database."""
    with pytest.raises(CompileError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
