"""`AheadMeasurer`: this machine's device, for which as many candidates are built at once as there are processors.

A compiler takes longer for most candidates than their measurement does. Several children build the next few; when all
are done, the candidates are timed one after the other, each in the child that built it, while nothing else runs: the
threads of TVM's runtime, too, look for work for a while after a kernel has ended, and another child waits for that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self

from awq_compile import settings
from awq_compile.errors import EnvironmentMissingError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import Measurement, Plan, Work

_MOST: Final = 8  # children: each has the inputs of a work
_EACH: Final = 4  # candidates of a child: with more of them none waits long for the slowest, but a search learns later
_REST_SECONDS: Final = 0.3  # 0.15 were measured; TVM counts rounds of its loop, not time


class AheadMeasurer:
    """See `Measurer`. `workers` are of one device; those behind the first build only as long as they can."""

    def __init__(self, workers: Sequence[LocalMeasurer]) -> None:
        self._workers = list(workers)
        self._last = self._workers[0]  # that timed

    @staticmethod
    def here(spec: TargetSpec, seed: int = 0) -> AheadMeasurer:
        """For this machine's device."""
        count = min(settings.num_threads(), _MOST)
        return AheadMeasurer([LocalMeasurer(spec, seed=seed) for _ in range(count)])

    @property
    def capacity(self) -> int:
        """See `Measurer`: how many are built before they are timed."""
        return 1 if len(self._workers) == 1 else _EACH * len(self._workers)

    def fingerprint(self) -> Fingerprint:
        """See `Measurer`."""
        return self._workers[0].fingerprint()

    def roof(self) -> Roof:
        """See `Measurer`."""
        return self._workers[0].roof()

    def measure(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> Iterator[Measurement]:
        """See `Measurer`."""
        for at in range(0, len(schedules), self.capacity):
            next_ones = schedules[at : at + self.capacity]
            built, lost = self._build(work, next_ones, plan) if len(next_ones) > 1 else ({}, {})
            yield from lost.values()
            for worker in list(self._workers):
                mine = [s for s in next_ones if s not in lost and built.get(s, self._workers[0]) is worker]
                if mine:
                    self._rest(worker)
                    yield from worker.measure(work, mine, plan)

    def compare(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> list[Measurement]:
        """See `Measurer`."""
        self._rest(self._workers[0])
        return self._workers[0].compare(work, schedules, plan)

    def close(self) -> None:
        """See `Measurer`."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rest(self, worker: LocalMeasurer) -> None:
        """Until the threads of the last that timed sleep."""
        if worker is not self._last:
            time.sleep(_REST_SECONDS)
        self._last = worker

    def _build(
        self, work: Work, schedules: Sequence[Candidate], plan: Plan
    ) -> tuple[dict[Candidate, LocalMeasurer], dict[Candidate, Measurement]]:
        """(where each was built, what became of those that were not)."""
        jobs = deque(schedules)
        built: dict[Candidate, LocalMeasurer] = {}
        lost: dict[Candidate, Measurement] = {}

        def build(worker: LocalMeasurer) -> None:
            while jobs:
                try:
                    schedule = jobs.popleft()
                except IndexError:  # another took the last
                    return
                if (failed := worker.build(work, schedule, plan)) is not None:
                    lost[schedule] = failed
                else:
                    built[schedule] = worker

        with ThreadPoolExecutor(len(self._workers)) as pool:
            running = {worker: pool.submit(build, worker) for worker in self._workers}
            try:
                for worker, done in running.items():
                    try:
                        done.result()
                    except EnvironmentMissingError:  # a device may allow one process only
                        if worker is self._workers[0]:
                            raise
                        self._workers.remove(worker)
            except BaseException:
                jobs.clear()
                self.close()  # or the pool would wait for them
                raise
        return built, lost
