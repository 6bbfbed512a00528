"""`RpcMeasurer`: devices behind TVM RPC servers, several of one key in parallel.

Each connection is a worker process (`rpc_device`) under a `LocalMeasurer`, so that one that hangs is killed. A
candidate whose worker is lost is measured once more, after the others and by whichever device is free: it may have
taken its device down, or the device may have died of itself. A device that does not come back is dropped.

With `Builds`, candidates are built elsewhere, for each device one more than it measures; workers find the libraries.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final, Self

from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof, nominal_roof
from awq_compile.tuning.ahead import AheadMeasurer
from awq_compile.tuning.export import Builds
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import Measurement, Plan, Work
from awq_compile.tuning.ray_builds import RayBuilds, check_address
from awq_compile.tuning.tracker import Address, Tracker

_TRIES: Final = 2  # of a candidate that loses its device


@dataclass(frozen=True)
class Place:
    """Where to measure: the devices of `key` that a tracker has, or that of one server, which may ask for a key.

    Neither: this machine. `ray` is the Ray cluster that builds for devices elsewhere; without one, this machine does.
    """

    tracker: Address | None = None
    server: Address | None = None
    key: str = ""
    ray: str = ""

    @staticmethod
    def parse(tracker: str | None, server: str | None, key: str | None, ray: str | None = None) -> Place:
        """What was typed. Raises `UsageError`."""
        if tracker and server:
            raise UsageError("a tracker and a server exclude each other", hint="a tracker knows its servers")
        if tracker and not key:
            raise UsageError(f"which devices of the tracker at {tracker}?", hint="--device-key KEY")
        if key and not (tracker or server):
            raise UsageError(f"the device key {key!r} belongs to a tracker or a server", hint="--rpc-tracker HOST:PORT")
        if key and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key):
            raise UsageError(f"the device key {key!r:.80} is not one word of letters, digits, '.', '_' and '-'")
        if ray and not (tracker or server):
            raise UsageError("kernels for this machine's own device are built here, not by Ray", hint="leave out --ray")
        address = Address.parse(text) if (text := tracker or server) else None
        ray = check_address(ray) if ray else ""
        return Place(address if tracker else None, address if server else None, key or "", ray)

    def open(self, spec: TargetSpec, seed: int) -> AheadMeasurer | RpcMeasurer:
        """A measurer. Raises `EnvironmentMissingError` where nothing is."""
        if self.tracker is not None:
            return tracker_measurer(spec, self.tracker, self.key, seed, self.ray)
        if self.server is not None:
            return server_measurer(spec, self.server, self.key, seed, self.ray)
        return AheadMeasurer.here(spec, seed)

    def __str__(self) -> str:
        if self.tracker is not None:
            return f"{self.key} at {self.tracker}"
        return str(self.server) if self.server is not None else "here"


def tracker_measurer(spec: TargetSpec, address: Address, key: str, seed: int = 0, ray: str = "") -> RpcMeasurer:
    """All devices that a tracker has under a key. Raises `EnvironmentMissingError` where there are none."""
    devices = Tracker(address).devices()
    if not devices.get(key):
        known = ", ".join(f"{name} ({count})" for name, count in sorted(devices.items())) or "no device at all"
        raise EnvironmentMissingError(
            f"the tracker at {address} has no device with the key {key!r}; it has {known}",
            hint=f"on the device: python -m tvm.exec.rpc_server --tracker {address} --key {key}",
        )
    return _measurer(spec, ["tracker", str(address), key], devices[key], seed, ray)


def server_measurer(spec: TargetSpec, address: Address, key: str = "", seed: int = 0, ray: str = "") -> RpcMeasurer:
    """The device of one server, which asks its clients for `key`."""
    return _measurer(spec, ["server", str(address), key], 1, seed, ray)


def _measurer(spec: TargetSpec, connection: list[str], count: int, seed: int, ray: str) -> RpcMeasurer:
    for package in ("cloudpickle", "tornado"):
        if find_spec(package) is None:
            raise EnvironmentMissingError(
                f"the Python package {package!r} is missing, which TVM's RPC needs",
                hint="pip install awq-compile[farm]",
            )
    builds = RayBuilds(ray, spec) if ray else None
    command = [sys.executable, "-m", "awq_compile.tuning.rpc_device", *connection]
    command += [str(builds.folder)] if builds is not None else []
    return RpcMeasurer([LocalMeasurer(spec, seed=seed, command=command) for _ in range(count)], builds)


class RpcMeasurer:
    """`shares` counts measurements by the address of the server; `dropped` says why workers are not used any more.

    `builds` it closes too.
    """

    def __init__(self, workers: Sequence[LocalMeasurer], builds: Builds | None = None) -> None:
        self.spec = workers[0].spec
        self.builds = builds
        self.shares: Counter[str] = Counter()
        self.dropped: list[str] = []
        self._live = list(workers)
        self._device: Fingerprint | None = None
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """See `Measurer`. While every device measures, as many candidates again are built elsewhere."""
        return max(1, len(self._live)) * (1 if self.builds is None else 2)

    def fingerprint(self) -> Fingerprint:
        """See `Measurer`: that of the first device that answers; those that differ are dropped."""
        while self._device is None:
            if not self._live:
                raise self._none_left()
            self._starts(self._live[0])
        return self._device

    def roof(self) -> Roof:
        """See `Measurer`: by the data sheet."""
        return nominal_roof(self.spec.name)

    def measure(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> Iterator[Measurement]:
        """See `Measurer`. Raises `EnvironmentMissingError` when no device is left for what was not begun."""
        if self.builds is not None:
            self.builds.begin([(work, schedule) for schedule in schedules], plan.limit)
        jobs = _Jobs(schedules)
        told: queue.Queue[Measurement | BaseException | None] = queue.Queue()

        def serve(worker: LocalMeasurer) -> None:
            try:
                self._serve(worker, work, plan, jobs, told.put)
            except BaseException as error:  # a bug of ours: raised where it is seen
                told.put(error)
            told.put(None)

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in self._live]
        for thread in threads:
            thread.start()
        try:
            serving = len(threads)
            while serving:
                found = told.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    serving -= 1
                else:
                    yield found
        finally:
            jobs.close()
            if self.builds is not None:
                self.builds.forget()
            for thread in threads:
                thread.join()
        lost, untried = jobs.left()
        yield from lost
        if untried:
            raise self._none_left()

    def compare(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> list[Measurement]:
        """See `Measurer`: on the first device that does not die of it."""
        if self.builds is not None:
            self.builds.begin([(work, schedule) for schedule in schedules], plan.limit)
        lost = {s: found for s in schedules if (found := self._unbuilt(work, s)) is not None}
        built = [schedule for schedule in schedules if schedule not in lost]
        for worker in list(self._live):
            if self._starts(worker):
                try:
                    times = worker.compare(work, built, plan)
                except EnvironmentMissingError as error:
                    self._drop(worker, error)
                else:
                    self.shares[worker.where] += len(times)
                    return [lost.get(s) or times.pop(0) for s in schedules]
        raise self._none_left()

    def close(self) -> None:
        """See `Measurer`."""
        for worker in self._live:
            worker.close()
        if self.builds is not None:
            self.builds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(
        self, worker: LocalMeasurer, work: Work, plan: Plan, jobs: _Jobs, tell: Callable[[Measurement], None]
    ) -> None:
        """Measures with one worker until no jobs are left or its device is gone."""
        while self._starts(worker) and (schedule := jobs.take()) is not None:
            found = self._unbuilt(work, schedule)
            try:
                if found is None:
                    (found,) = worker.measure(work, [schedule], plan)
            except EnvironmentMissingError as error:
                self._drop(worker, error)
                jobs.put_back(schedule)
                return
            if found.status not in ("crashed", "hung") or not jobs.again(found):
                with self._lock:
                    self.shares[worker.where] += 1
                tell(found)
                jobs.finish()

    def _unbuilt(self, work: Work, schedule: Candidate) -> Measurement | None:
        """Waits for the library that is built elsewhere; the measurement of a candidate that gives none."""
        found = self.builds.library(work, schedule) if self.builds is not None else None
        return replace(found, device=self._device) if isinstance(found, Measurement) else None

    def _starts(self, worker: LocalMeasurer) -> bool:
        """Whether a worker is connected to a device like the first one; else it is dropped."""
        try:
            device = worker.fingerprint()
        except EnvironmentMissingError as error:
            self._drop(worker, error)
            return False
        with self._lock:
            self._device = self._device or device
        if device != self._device:
            self._drop(worker, EnvironmentMissingError(f"{worker.where} is another device: {device.label}"))
        return device == self._device

    def _drop(self, worker: LocalMeasurer, error: EnvironmentMissingError) -> None:
        worker.close()
        with self._lock:
            self._live.remove(worker)
            self.dropped.append(str(error))

    def _none_left(self) -> EnvironmentMissingError:
        return EnvironmentMissingError(
            f"no device is left that measures for {self.spec.name}: {'; '.join(self.dropped)}",
            hint="start the devices' servers again: the run goes on where it ended",
        )


class _Jobs:
    """Candidates that wait for a device; one that was taken comes back, or is finished."""

    def __init__(self, schedules: Sequence[Candidate]) -> None:
        self._waiting = deque(schedules)
        self._taken = 0
        self._closed = False
        self._lost: dict[Candidate, list[Measurement]] = {}
        self._changed = threading.Condition()

    def take(self) -> Candidate | None:
        """The next one, waiting for those that others may give back; None when all are finished."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or not self._taken)
            if self._closed or not self._waiting:
                return None
            self._taken += 1
            return self._waiting.popleft()

    def put_back(self, schedule: Candidate) -> None:
        """For another device, behind the others."""
        with self._changed:
            self._waiting.append(schedule)
            self._taken -= 1
            self._changed.notify_all()

    def again(self, found: Measurement) -> bool:
        """Whether a candidate that lost its device is tried once more; then it is put back."""
        lost = self._lost.setdefault(found.schedule, [])
        lost.append(found)
        if len(lost) == _TRIES:
            return False
        self.put_back(found.schedule)
        return True

    def finish(self) -> None:
        """One is done."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is given out any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def left(self) -> tuple[list[Measurement], list[Candidate]]:
        """(the results of those that lost their device and found no other, those that were never tried)."""
        lost = [self._lost[schedule][-1] for schedule in self._waiting if schedule in self._lost]
        return lost, [schedule for schedule in self._waiting if schedule not in self._lost]
