"""Records replace the target's rule for exactly their machine, problem and bucket."""

import json
from pathlib import Path

import pytest

from awq_compile.errors import AwqCompileError
from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import GemmSchedule, GemvSchedule, LinearSchedule
from awq_compile.tuning.database import ScheduleDatabase

PROBLEM = MatmulProblem(64, 128, QuantSpec(4, 32))
RULE = LinearSchedule(GemvSchedule(8, 2), GemvSchedule(8, 2, 2), GemmSchedule(8, 6, 2, 256, 96))


def record(**changes: object) -> str:
    """A line of the database."""
    schedule = {"lanes": 8, "rows": 8, "prefetch": 2}
    return json.dumps({"machine": "m", "problem": PROBLEM.name, "bucket": "gemv", "schedule": schedule} | changes)


def test_the_last_record_wins_and_says_so(tmp_path: Path) -> None:
    """The other buckets keep the rule; another machine and another problem get nothing."""
    (tmp_path / "a.jsonl").write_text(record(schedule={"lanes": 8, "rows": 4}) + "\n\n" + record() + "\n")
    database = ScheduleDatabase.load(tmp_path.glob("*.jsonl"))
    chosen, sources = database.apply("m", PROBLEM, RULE)
    assert chosen == LinearSchedule(GemvSchedule(8, 8, prefetch=2), RULE.small, RULE.gemm)
    assert sources == {"gemv": "tuned", "small": "rule", "gemm": "rule"}
    assert database.apply("other", PROBLEM, RULE)[0] == RULE
    assert database.apply("m", MatmulProblem(65, 128, QuantSpec(4, 32)), RULE)[0] == RULE


@pytest.mark.parametrize(
    "line", ["{", record(bucket="x"), record(schedule={"lanes": 8}), record(schedule={"lanes": 7, "rows": 2}), "[]"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    """File and line number."""
    (tmp_path / "a.jsonl").write_text(record() + "\n" + line + "\n")
    with pytest.raises(AwqCompileError, match=r"a\.jsonl:2|illegal"):
        ScheduleDatabase.load([tmp_path / "a.jsonl"])
