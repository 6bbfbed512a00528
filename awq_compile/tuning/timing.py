"""Runs a loaded kernel: the result first, then the times. Knows neither how it was built nor what runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from awq_compile.targets.roofs import Roof
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.inputs import Inputs
from awq_compile.tuning.measure import Plan, Times, Work


class Kernel(Protocol):
    """A candidate on a device, with its arguments, which all kernels of a work share."""

    def poison(self) -> None:
        """Overwrites y, which may be right by another kernel's doing."""

    def run(self, copy: int, *, cold: bool) -> float:
        """Runs with a copy of W, waits, and gives the seconds that the device took.

        Where W lies there once, `cold` says whether caches are emptied before.
        """

    def wrong(self) -> str:
        """What is wrong with the last result; empty when nothing is."""


class Device(Protocol):
    """Builds and loads kernels in this process."""

    fingerprint: Fingerprint
    copies: int  # of W, for the work that was prepared

    def roof(self) -> Roof:
        """What it reaches at most, measured now."""

    def prepare(self, inputs: Inputs) -> None:
        """Takes the arguments of the kernels that are loaded from now on."""

    def load(self, work: Work, candidate: Candidate) -> Kernel:
        """Builds a candidate. Raises anything."""


@dataclass
class Rotation:
    """The copies of W of one work, in turn for all of its kernels: what another has just read is warm, too."""

    copies: int
    last: int = 0

    def next(self) -> int:
        """The copy that no kernel read for longest."""
        self.last = (self.last + 1) % self.copies
        return self.last


@dataclass
class Clock:
    """Times of one kernel; all clocks of a work share its rotation."""

    kernel: Kernel
    rotation: Rotation
    estimate: float = math.inf  # seconds of a run

    def cold(self) -> float:
        """One run over weights that lie in no cache."""
        return self.kernel.run(self.rotation.next(), cold=True)

    def warm(self) -> float:
        """One run over the copy that was read last."""
        return self.kernel.run(self.rotation.last, cold=False)


def check(clock: Clock) -> str:
    """Runs once and says what is wrong with the result."""
    clock.kernel.poison()
    clock.estimate = clock.cold()
    return clock.kernel.wrong()


def time_kernel(clock: Clock, plan: Plan) -> tuple[Times, Times | None]:
    """(cold, warm) of one kernel."""
    return time_in_turns([clock], plan)[0]


def time_in_turns(clocks: Sequence[Clock], plan: Plan) -> list[tuple[Times, Times | None]]:
    """(cold, warm) of several kernels, their runs spread evenly among each other's: a disturbance meets all of them."""
    for clock in clocks:
        for _ in range(plan.warmups if clock.estimate <= plan.slow else 0):
            clock.estimate = min(clock.estimate, clock.cold())
    counts = [plan.cold_runs(clock.estimate) for clock in clocks]
    cold: list[list[float]] = [[] for _ in clocks]
    for at in in_turns(counts):
        cold[at].append(clocks[at].cold())
    warm = [[clock.warm() for _ in range(plan.warm_runs(clock.estimate))] for clock in clocks]
    return [(Times.of(c), Times.of(w) if w else None) for c, w in zip(cold, warm, strict=True)]


def in_turns(counts: Sequence[int]) -> list[int]:
    """Each number i, `counts[i]` times, evenly spread; the order within a round changes from one to the next.

    A kernel does not always run in the wake of the same other.
    """
    rounds, order = max(counts, default=0), []
    for round_ in range(rounds):
        for i in range(len(counts)):
            at = (i + round_) % len(counts)
            if (round_ + 1) * counts[at] // rounds > round_ * counts[at] // rounds:
                order.append(at)
    return order


def last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports, else 32 MiB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=32 << 20)
