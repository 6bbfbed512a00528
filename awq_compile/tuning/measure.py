"""What is measured, how, and what comes out: the one interface of this machine, of RPC devices and of bundles.

    with LocalMeasurer(resolve_target("cpu")) as measurer:
        for found in measurer.measure(Work(problem, "gemv", 1), schedules, SEARCH):
            print(found.schedule, found.status, found.seconds)

A candidate is run against the float64 oracle first; one that is wrong, does not build, crashes or never ends
gives a `Measurement` that says so and has no time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Protocol, Self

from awq_compile.errors import CompileError
from awq_compile.problem import ROW_BUCKETS, MatmulProblem, serves
from awq_compile.schedules import LinearSchedule
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate, decode_candidate, encode_candidate
from awq_compile.tuning.record import are_seconds

Status = Literal["ok", "wrong", "failed", "crashed", "hung"]
STATUSES: Final[tuple[Status, ...]] = ("ok", "wrong", "failed", "crashed", "hung")


def rows_of(bucket: str, schedules: LinearSchedule) -> int:
    """M at which a bucket is measured: more of them where it does not get the few as well."""
    if bucket == "gemm":
        return 128 if schedules.large is None else 1024
    if bucket == "small" and schedules.quad is None:
        return 4
    return ROW_BUCKETS[bucket]


@dataclass(frozen=True)
class Work:
    """One kernel to find a schedule for: a problem at `rows` rows of x, in the bucket that serves them."""

    problem: MatmulProblem
    bucket: str
    rows: int

    def __post_init__(self) -> None:
        if not serves(self.bucket, self.rows):
            raise CompileError(f"{self.problem.name}: {self.rows} rows are not in the bucket {self.bucket}")

    @property
    def name(self) -> str:
        """Unique among works; a C identifier."""
        return f"{self.problem.name}_m{self.rows}"


@dataclass(frozen=True)
class Plan:
    """How long a candidate is measured. Times are seconds.

    After a checked run and `warmups` more, runs over cold weights fill `cold_seconds`, but are at least `least` and
    at most `most`; then runs over the same weights fill `warm_seconds`. A kernel that alone takes longer than `slow`
    runs once more and no oftener. `limit` is for everything that one candidate does, compiling included: beyond it
    the candidate hangs.
    """

    warmups: int = 2
    least: int = 3
    most: int = 50
    cold_seconds: float = 0.06
    warm_seconds: float = 0.01
    slow: float = 0.7
    limit: float = 30.0

    def cold_runs(self, run_seconds: float) -> int:
        """How many runs over cold weights a kernel gets."""
        return 1 if run_seconds > self.slow else self._fill(run_seconds, self.cold_seconds, self.least)

    def warm_runs(self, run_seconds: float) -> int:
        """How many runs over warm weights."""
        return 0 if run_seconds > self.slow else self._fill(run_seconds, self.warm_seconds, 1)

    def _fill(self, run_seconds: float, budget: float, least: int) -> int:
        return max(least, min(self.most, int(budget / max(run_seconds, 1e-9))))


SEARCH: Final = Plan()
FINAL: Final = Plan(warmups=3, least=9, most=201, cold_seconds=0.8, warm_seconds=0.05, limit=120.0)


@dataclass(frozen=True)
class Times:
    """Median, first and third quartile of `count` runs, in seconds."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        """Of the runs' times."""
        if len(seconds) < 2:
            return Times(seconds[0], seconds[0], seconds[0], len(seconds))
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Times(median, low, high, len(seconds))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Measurement:
    """What measuring a candidate gave. `error` says why there are no times."""

    schedule: Candidate
    status: Status
    cold: Times | None = None
    warm: Times | None = None
    error: str = ""
    device: Fingerprint | None = None

    @property
    def seconds(self) -> float:
        """What is compared: the cold median; infinite for a candidate that must not be chosen."""
        return self.cold.median if self.status == "ok" and self.cold is not None else math.inf

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        found: dict[str, Any] = {"schedule": encode_candidate(self.schedule), "status": self.status}
        found |= {name: asdict(value) for name in ("cold", "warm", "device") if (value := getattr(self, name))}
        return found | ({"error": self.error} if self.error else {})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measurement:
        """Inverse of `to_json`, for data from outside. Raises `CompileError` saying what does not fit."""
        try:
            schedule, status = decode_candidate(data["schedule"]), data["status"]
            times = {name: Times(**data[name]) for name in ("cold", "warm") if name in data}
            for found in times.values():
                values = (found.median, found.low, found.high)
                if not all(map(are_seconds, values)) or type(found.count) is not int:
                    raise CompileError(f"a measurement holds the times {values!s:.200}")
            device = Fingerprint(**data["device"]) if "device" in data else None
        except (KeyError, TypeError) as error:
            raise CompileError(f"not a measurement: {error!r:.200}") from None
        if status not in STATUSES or (status == "ok" and "cold" not in times):
            raise CompileError(f"a measurement of status {status!r:.40} with the times {', '.join(times) or 'none'}")
        return Measurement(schedule, status, error=str(data.get("error", "")), device=device, **times)


class Measurer(Protocol):
    """Measures candidates on one device or several. Close it, or use it as a context manager."""

    @property
    def capacity(self) -> int:
        """How many candidates it measures at the same time; searches ask for as many at once."""

    def fingerprint(self) -> Fingerprint:
        """The device, which is started if need be. Raises `EnvironmentMissingError` where there is none."""

    def roof(self) -> Roof:
        """What the device reaches at most: measured, or by its data sheet where it cannot be."""

    def measure(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> Iterator[Measurement]:
        """One measurement for each schedule, as they finish; never raises for what a candidate does."""

    def compare(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> list[Measurement]:
        """Measurements in the order of `schedules`, all on one device and their runs taken in turns."""

    def close(self) -> None:
        """Ends processes and connections."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
