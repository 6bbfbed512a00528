"""What `awq-compile tune` says of the records: --list, --explain, --merge and --diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_compile.cli.console import Output, shown
from awq_compile.errors import UsageError

if TYPE_CHECKING:
    from awq_compile.targets.base import TargetSpec
    from awq_compile.tuning.problems import Share
    from awq_compile.tuning.record import Record


def explain(spec: TargetSpec, shares: list[Share], output: Output) -> None:
    """What each kernel of a model gets, why, and what is known of it."""
    from awq_compile.tuning.database import known_records
    from awq_compile.tuning.templates import describe_schedule

    database = known_records()
    _tell(database.notes, output)
    rows = []
    for share in shares:
        problem, bucket = share.work.problem, share.work.bucket
        choice = database.choose(spec, problem, bucket, spec.rule(problem).of(bucket))
        words, record = describe_schedule(choice.schedule), choice.record
        output.say(f"{problem.name}, {bucket}, {share.share:.0%} of {_STEPS[bucket]}")
        output.say(f"  {choice.words}: {words}")
        if record is not None:
            output.say(f"  {_figures(record)}, {record.trials} tried")
        rows.append(
            {
                "kernel": problem.name,
                "bucket": bucket,
                "share": share.share,
                "source": choice.source,
                "schedule": words,
                "record": None if record is None else _json(record),
            }
        )
    output.result({"target": spec.name, "kernels": rows, "notes": list(database.notes)})


_STEPS = {
    "gemv": "a decode step",
    "pair": "a decode step of two sequences",
    "quad": "a decode step of 3 or 4 sequences",
    "small": "a decode step of a small batch",
    "medium": "a decode step of 9 to 16 sequences",
    "broad": "a decode step of 17 to 32 sequences",
    "large": "a decode step of 33 to 64 sequences",
    "wide": "a short prefill",
    "gemm": "a prefill",
}


def list_records(output: Output) -> None:
    """All files of the database, whether their records are used or not."""
    from awq_compile.tuning.database import read_records, shipped_files, user_files
    from awq_compile.tuning.templates import describe_schedule

    rows, notes = [], []
    for whose, files in (("shipped", shipped_files()), ("yours", user_files())):
        for path in files:
            records, damaged = read_records(path)
            notes += damaged
            output.say(f"{shown(path)} ({whose}, {len(records)} records)")
            for record in records:
                serves = record.machine + (f", {record.preset} only" if record.preset else "")
                unused = "" if record.current else ", of another version: not used"
                output.say(f"  {record.problem.name}, {record.bucket}, for {serves}, on {record.device.name}{unused}")
                output.say(f"    {describe_schedule(record.schedule)}: {_figures(record)}")
                rows.append({"file": str(path), "whose": whose, "used": record.current, **_json(record)})
    _tell(notes, output)
    if not rows:
        output.say("no records yet: awq-compile tune MODEL --target T measures some")
    output.result({"records": rows, "notes": notes})


def merge_files(files: list[Path], out: Path | None, output: Output) -> None:
    """Into one file, or each record into the user's file of its device."""
    from awq_compile.tuning.database import device_file, merge, read_records, user_folder, write_records

    if not files:
        raise UsageError("--merge needs files of records", hint="awq-compile tune --merge results.jsonl")
    groups: dict[Path, list[Record]] = {}
    skipped: list[str] = []
    for path in files:
        records, notes = read_records(path)
        skipped += notes
        for record in records:
            groups.setdefault(out or device_file(user_folder(), record), []).append(record)
    _tell(skipped, output)
    written = {}
    for path, records in sorted(groups.items()):
        old, damaged = read_records(path) if path.exists() else ([], [])
        if damaged:
            raise UsageError(f"{path} holds lines that are no records", hint=f"look at it: {damaged[0]}")
        merged = merge([*old, *records])
        write_records(path, merged)
        written[str(path)] = len(merged)
        output.say(f"{shown(path)}: {len(merged)} records, {len(merged) - len(old)} of them new")
    output.result({"files": written, "skipped": skipped})


def diff_files(files: list[Path], output: Output) -> None:
    """What differs between two files: records of one alone, and schedules and times of those in both."""
    from awq_compile.tuning.database import merge, read_records
    from awq_compile.tuning.templates import describe_schedule

    if len(files) != 2:
        raise UsageError(f"--diff compares two files, got {len(files)}", hint="awq-compile tune --diff A B")
    sides = []
    for path in files:
        records, notes = read_records(path)
        _tell(notes, output)
        sides.append({(record.key, record.device): record for record in merge(records)})
    before, after = sides
    rows = []
    for where in sorted(before.keys() | after.keys(), key=str):
        one, other = before.get(where), after.get(where)
        if one == other:
            continue
        record = one or other
        assert record is not None
        what = "added" if one is None else "removed" if other is None else "changed"
        output.say(f"{what}: {record.problem.name}, {record.bucket}, for {record.machine}, on {record.device.name}")
        for sign, side in (("-", one), ("+", other)):
            if side is not None:
                output.say(f"  {sign} {describe_schedule(side.schedule)}: {time_words(side.seconds)}")
        pair = {"before": _json(one) if one else None, "after": _json(other) if other else None}
        rows.append({"kernel": record.problem.name, "bucket": record.bucket, "what": what, **pair})
    if not rows:
        output.say("the same records")
    output.result({"differences": rows})


def time_words(value: float) -> str:
    """`12.3 µs`, `4.56 ms`, `1.2 s`."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _figures(record: Record) -> str:
    from awq_compile.tuning.templates import describe_schedule

    words = (
        f"{time_words(record.seconds)}, {record.roofline_seconds / record.seconds:.0%} of the roofline, "
        f"{record.untuned_seconds / record.seconds:.2f} times untuned"
    )
    if record.runner_up is not None and record.runner_up_seconds is not None:
        words += f"; runner-up {describe_schedule(record.runner_up)}, {time_words(record.runner_up_seconds)}"
    return words


def _tell(notes: list[str] | tuple[str, ...], output: Output) -> None:
    for note in notes:
        output.step(note)


def _json(record: Record) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(record.line())
    return data
