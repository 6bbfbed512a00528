"""The database of measured schedules: JSON lines, one `Record` a line, one file per device.

Files are sorted and hold a key once, so that equal records give equal files and two files merge line by line,
also by `git merge`. A line that does not fit is skipped and named in `ScheduleDatabase.notes`; records of another
version of their template or of TVM are counted there.

The compiler asks with a problem and a bucket, and gets the first that there is:

    tuned     a record of this problem
    nearest   a record of the nearest problem of the same format, kind of epilogue and bucket, if its schedule is legal
    rule      the target's untuned schedule
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock

from awq_compile import settings
from awq_compile.errors import AwqCompileError, CompileError, EnvironmentMissingError
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import ColumnGemvSchedule, GemmSchedule, LinearSchedule
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.record import Record, parse_record, preset_of
from awq_compile.tuning.space import why_illegal
from awq_compile.tuning.templates import Schedule

SUFFIX: Final = ".jsonl"
_MOST_BYTES: Final = 64 << 20  # of a file
_FARTHEST: Final = 3.0  # factors of two in N and K together, up to which a neighbour's schedule is taken
_NOTES: Final = 20


@dataclass(frozen=True)
class Choice:
    """A schedule and where it is from."""

    schedule: Schedule
    source: Literal["tuned", "nearest", "rule"]
    record: Record | None = None

    @property
    def words(self) -> str:
        """For the report."""
        return f"nearest: {self.record.problem.name}" if self.source == "nearest" and self.record else self.source


@dataclass(frozen=True)
class ScheduleDatabase:
    """Records that are current, later ones before earlier ones of the same key; what was not taken is in `notes`."""

    records: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()
    _by_problem: dict[tuple[str, str, str], list[Record]] = field(default_factory=dict, repr=False, compare=False)
    _by_kind: dict[tuple[object, ...], list[Record]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for record in self.records:
            self._by_problem.setdefault((record.machine, record.problem.name, record.bucket), []).append(record)
            self._by_kind.setdefault(_kind(record.machine, record.problem, record.bucket), []).append(record)

    @staticmethod
    def load(files: Iterable[Path]) -> ScheduleDatabase:
        """Reads files in the given order; the last record of a key wins."""
        found: dict[object, Record] = {}
        notes: list[str] = []
        for path in files:
            records, damaged = read_records(path)
            notes += damaged
            other = sum(not record.current for record in records)
            if other:
                notes.append(f"{path}: {other} records of another version of their template or of TVM are not used")
            for record in records:
                if record.current:
                    found[record.key] = record
        return ScheduleDatabase(tuple(found.values()), tuple(notes))

    def choose(self, spec: TargetSpec, problem: MatmulProblem, bucket: str, rule: Schedule) -> Choice:
        """The schedule of a bucket; `rule` is the target's untuned one.

        Records of another template than the rule's are from before it was the rule's. Where the nearest problem's own
        rule was the fastest, so is this one's.
        """
        for record in self._by_problem.get((spec.machine, problem.name, bucket), ()):
            if type(record.schedule) is not type(rule):
                continue
            legal = record.schedule == rule or not why_illegal(problem, bucket, spec, record.schedule)
            if legal and record.serves(spec):
                return Choice(record.schedule, "tuned", record)
        for record in self.neighbours(spec, problem, bucket):
            if type(record.schedule) is not type(rule):
                continue
            if record.schedule == spec.rule(record.problem).by_bucket.get(bucket):
                break
            schedule = refit(record.schedule, problem)
            if not why_illegal(problem, bucket, spec, schedule):
                return Choice(schedule, "nearest", record)
        return Choice(rule, "rule")

    def neighbours(self, spec: TargetSpec, problem: MatmulProblem, bucket: str) -> list[Record]:
        """Records of problems of the same kind, the nearest first; each within a factor of eight in all."""
        near = [r for r in self._by_kind.get(_kind(spec.machine, problem, bucket), ()) if r.serves(spec)]
        near = [r for r in near if distance(r.problem, problem) <= _FARTHEST]
        return sorted(near, key=lambda r: (distance(r.problem, problem), r.problem.name))

    def choose_linear(self, spec: TargetSpec, problem: MatmulProblem) -> tuple[LinearSchedule, dict[str, Choice]]:
        """The schedules of all buckets, and where each is from."""
        rule = spec.rule(problem)
        choices = {bucket: self.choose(spec, problem, bucket, untuned) for bucket, untuned in rule.by_bucket.items()}
        return replace(rule, **{bucket: choice.schedule for bucket, choice in choices.items()}), choices  # type: ignore[arg-type]


def distance(one: MatmulProblem, other: MatmulProblem) -> float:
    """Factors of two between the sizes of two problems."""
    return abs(math.log2(one.n / other.n)) + abs(math.log2(one.k / other.k))


def refit(schedule: Schedule, problem: MatmulProblem) -> Schedule:
    """A schedule of another problem, fitted to this one's sizes."""
    if isinstance(schedule, GemmSchedule):
        return schedule.fit(problem.n, pairs=problem.epilogue.activation == "silu_mul")
    return schedule.fit(problem.n) if isinstance(schedule, ColumnGemvSchedule) else schedule


def _kind(machine: str, problem: MatmulProblem, bucket: str) -> tuple[object, ...]:
    """What two problems must share for a schedule of one to say something about the other."""
    return machine, bucket, problem.spec, problem.dtype, problem.epilogue.activation == "silu_mul"


def read_records(path: Path) -> tuple[list[Record], list[str]]:
    """(the records of a file, what is wrong with its other lines). An unreadable file is an error."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CompileError(f"{path}: {path.stat().st_size} bytes, and at most {_MOST_BYTES} are read")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CompileError(f"{path} cannot be read: {error.strerror}") from None
    records, notes = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(parse_record(line.decode("utf-8")))
        except (AwqCompileError, UnicodeDecodeError) as error:
            notes.append(f"{path}:{number}: skipped, not a record: {error}")
    if len(notes) > _NOTES:
        notes = [*notes[:_NOTES], f"{path}: {len(notes) - _NOTES} more lines are skipped"]
    return records, notes


def merge(records: Iterable[Record]) -> list[Record]:
    """One record of each key and device, sorted; of several the fastest, so that the order does not matter."""
    best: dict[object, Record] = {}
    for record in records:
        where = (record.key, record.device)
        kept = best.get(where)
        if kept is None or (record.seconds, record.line()) < (kept.seconds, kept.line()):
            best[where] = record
    return sorted(best.values(), key=Record.line)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(f"{record.line()}\n" for record in records), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EnvironmentMissingError(
            f"{path} cannot be written: {error.strerror}", hint="free some space, or choose another place"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def add_records(path: Path, new: Iterable[Record]) -> None:
    """Puts records into a file, where each replaces the former one of its key and device; other processes wait."""
    fresh = {(record.key, record.device): record for record in new}
    with FileLock(settings.cache_folder() / "tuned.lock"):
        old = read_records(path)[0] if path.exists() else []
        kept = [record for record in old if (record.key, record.device) not in fresh]
        write_records(path, sorted([*kept, *fresh.values()], key=Record.line))


def user_folder() -> Path:
    """Where `awq-compile tune` keeps what it found."""
    return settings.cache_dir() / "tuned"


def device_file(folder: Path, record: Record) -> Path:
    """The file of a record's device and limits."""
    preset = f"-{record.preset}" if record.preset else ""
    return folder / f"{record.device.slug}-{record.machine}{preset}{SUFFIX}"


def shipped_files() -> list[Path]:
    """The measured schedules that come with the package: `targets/tuned/*.jsonl`."""
    from importlib.resources import files

    folder = Path(str(files("awq_compile.targets"))) / "tuned"
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def user_files() -> list[Path]:
    """Those that were measured here."""
    folder = user_folder()
    return sorted(p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(".")) if folder.is_dir() else []


def known_records() -> ScheduleDatabase:
    """Shipped records, and the user's before them."""
    return ScheduleDatabase.load([*shipped_files(), *user_files()])


def preset_restriction(spec: TargetSpec, device_kind: str) -> str:
    """`Record.preset` of what a device measures for a target: a GPU's target on a CPU serves that target only."""
    return preset_of(spec) if spec.has_device_code and device_kind == "cpu" else ""
