"""A device that runs nothing: what a candidate does, and how long it takes, is in the fields of its schedule.

Started as a program it is a worker for `LocalMeasurer`, as `awq_compile.tuning.worker` is for real devices.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import GemvSchedule
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.export import library_name
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.inputs import Inputs
from awq_compile.tuning.measure import Measurement, Plan, Times, Work

COMMAND = [sys.executable, str(Path(__file__).resolve())]
GOOD, CRASHES, HANGS, WRONG, FAILS = range(5)  # the field `prefetch`
PROBLEM = MatmulProblem(96, 64, QuantSpec(4, 32), dtype="float16")
WORK = Work(PROBLEM, "gemv", 1)


def fake(what: int, rows: int = 2) -> GemvSchedule:
    """A candidate that behaves so, and where it is good takes `rows` microseconds."""
    return GemvSchedule(4, rows, prefetch=what)


def event(what: str) -> None:
    """A line in the file that `FAKE_DEVICE_EVENTS` names, by all workers in turn."""
    if log := os.environ.get("FAKE_DEVICE_EVENTS"):
        with Path(log).open("a") as file:
            file.write(f"{what}\n")


@dataclass(frozen=True)
class FakeKernel:
    """See `timing.Kernel`."""

    schedule: Any

    def poison(self) -> None:
        pass

    def run(self, copy: int, *, cold: bool) -> float:
        event("run")
        if self.schedule.prefetch == CRASHES:
            os.abort()
        if self.schedule.prefetch == HANGS:
            time.sleep(1000)
        return (self.schedule.rows + copy / 1000) * 1e-6

    def wrong(self) -> str:
        return "y is wrong" if self.schedule.prefetch == WRONG else ""


class FakeDevice:
    """See `timing.Device`."""

    fingerprint = Fingerprint("fake", "gpu", "driver 1", 1)
    copies = 3

    def roof(self) -> Roof:
        return Roof(1e9, 2e9, 0.0, 1, "made up")

    def prepare(self, inputs: Inputs) -> None:
        if log := os.environ.get("FAKE_DEVICE_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{inputs.work.name}\n")

    def load(self, work: Work, candidate: Any) -> FakeKernel:
        event("build")
        if candidate.prefetch == FAILS:
            raise ValueError("does not compile")
        return FakeKernel(candidate)


class FakeBuilds:
    """`Builds` at once: of those that do not compile a measurement, and of others a file that nothing can load."""

    def __init__(self, folder: Path, suffix: str = ".so") -> None:
        self.folder, self.suffix = folder, suffix
        self.begun: list[Any] = []
        self.closed = False

    def begin(self, jobs: Sequence[tuple[Work, Any]], limit: float) -> None:
        self.forget()
        self.begun = list(jobs)

    def library(self, work: Work, candidate: Any) -> Path | Measurement:
        assert (work, candidate) in self.begun
        if candidate.prefetch == FAILS:
            return Measurement(candidate, "failed", error="does not compile there")
        path = self.folder / library_name(work, candidate, self.suffix)
        path.write_bytes(b"no library")
        return path

    def forget(self) -> None:
        self.begun = []
        for path in self.folder.iterdir():
            path.unlink()

    def close(self) -> None:
        self.closed = True


class FakeMeasurer:
    """A `Measurer` in this process: `seconds` gives a candidate's time, or raises to end the search like a kill."""

    capacity = 1

    def __init__(self, seconds: Callable[[Any], float], kind: str = "gpu") -> None:
        self.seconds = seconds
        self.device = Fingerprint("Fake GPU 1", kind, "driver 1", 1)
        self.measured: list[Any] = []

    def fingerprint(self) -> Fingerprint:
        return self.device

    def roof(self) -> Roof:
        return FakeDevice().roof()

    def measure(self, work: Work, schedules: Sequence[Any], plan: Plan) -> Iterator[Measurement]:
        del work, plan
        for schedule in schedules:
            self.measured.append(schedule)
            yield self._measurement(schedule)

    def compare(self, work: Work, schedules: Sequence[Any], plan: Plan) -> list[Measurement]:
        del work, plan
        return [self._measurement(schedule) for schedule in schedules]

    def _measurement(self, schedule: Any) -> Measurement:
        seconds = self.seconds(schedule)
        if math.isinf(seconds):
            return Measurement(schedule, "crashed", error="signal 6", device=self.device)
        return Measurement(schedule, "ok", Times.of([seconds]), device=self.device)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    from awq_compile.tuning.worker import serve

    serve(lambda _: FakeDevice())
