"""The database of measured schedules: JSON lines, one record a line.

    {"machine": "simd16", "problem": "qmatmul_w4g128_n4096_k4096", "bucket": "gemv", "schedule": {"lanes": 16, …}}

`machine` is `TargetSpec.machine`: a record serves every target with those limits and no other. Later lines
win over earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from awq_compile.errors import AwqCompileError
from awq_compile.problem import ROW_BUCKETS, MatmulProblem
from awq_compile.schedules import GemmSchedule, GemvSchedule, LinearSchedule

_TEMPLATES: Final[dict[str, type[GemvSchedule] | type[GemmSchedule]]] = {
    "gemv": GemvSchedule,
    "small": GemvSchedule,
    "gemm": GemmSchedule,
}


@dataclass(frozen=True)
class ScheduleDatabase:
    """(machine, problem name, bucket) → schedule."""

    records: dict[tuple[str, str, str], GemvSchedule | GemmSchedule] = field(default_factory=dict)

    @staticmethod
    def load(files: Iterable[Path]) -> ScheduleDatabase:
        """Reads JSON-lines files in the order of their names. A line that does not fit is an error that names it."""
        records: dict[tuple[str, str, str], GemvSchedule | GemmSchedule] = {}
        for path in sorted(files):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    record: dict[str, Any] = json.loads(line)
                    template = _TEMPLATES[record["bucket"]]
                    key = (str(record["machine"]), str(record["problem"]), str(record["bucket"]))
                    records[key] = template(**record["schedule"])
                except (ValueError, KeyError, TypeError) as error:
                    raise AwqCompileError(f"{path}:{number}: not a schedule record: {error!r}") from None
        return ScheduleDatabase(records)

    def apply(
        self, machine: str, problem: MatmulProblem, rule: LinearSchedule
    ) -> tuple[LinearSchedule, dict[str, str]]:
        """`rule` with every bucket that has a record replaced, and "tuned" or "rule" for each bucket."""
        chosen, sources = rule, {}
        for bucket in ROW_BUCKETS:
            record = self.records.get((machine, problem.name, bucket))
            sources[bucket] = "rule" if record is None else "tuned"
            if record is not None:
                chosen = replace(chosen, **{bucket: record})  # type: ignore[arg-type]
        return chosen, sources


def shipped_records() -> ScheduleDatabase:
    """The measured schedules that come with the package: `targets/tuned/*.jsonl`."""
    from importlib.resources import files

    folder = Path(str(files("awq_compile.targets"))) / "tuned"
    return ScheduleDatabase.load(folder.glob("*.jsonl")) if folder.is_dir() else ScheduleDatabase()
