"""The child process in which candidates are built and run: one JSON request a line on stdin, one answer on stdout.

    {"do": "open", "target": "cpu"}                                      → {"device": {…}}
    {"do": "roof"}                                                       → {"roof": {…}}
    {"do": "work", "problem": "{…}", "bucket": "gemv", "rows": 1, "seed": 0}  → {"ready": true}
    {"do": "build", "schedule": {…}}                                     → {"built": true} or {"status": "failed", …}
    {"do": "measure", "schedule": {…}, "plan": {…}}                      → {"status": "ok", "cold": {…}, "warm": {…}}
    {"do": "compare", "schedules": [{…}, …], "plan": {…}}                → {"found": [{…}, …]}

A candidate that crashes takes this process with it, and one that hangs is killed with it: the parent knows
which one it asked for.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from awq_compile.problem import decode_problem
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.foreign import Candidate, decode_candidate
from awq_compile.tuning.inputs import make_inputs
from awq_compile.tuning.measure import Measurement, Plan, Work
from awq_compile.tuning.timing import Clock, Device, Kernel, Rotation, check, time_in_turns, time_kernel

_WORDS: Final = 400  # of a driver's message


class Worker:
    """One device, and the work it is prepared for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: Work | None = None
        self.rotation = Rotation(1)
        self._built: dict[Candidate, Kernel] = {}  # not measured yet

    def prepare(self, work: Work, seed: int) -> None:
        """Makes inputs and the oracle's results, once for all candidates of a work."""
        self.work = None
        self._built.clear()
        self.device.prepare(make_inputs(work, seed))
        self.work, self.rotation = work, Rotation(self.device.copies)

    def build(self, candidate: Candidate) -> Measurement | None:
        """Loads a kernel that is measured later."""
        assert self.work is not None
        try:
            self._built[candidate] = self.device.load(self.work, candidate)
        except Exception as error:  # a compiler raises what it likes
            return _failed(candidate, error)
        return None

    def clock(self, candidate: Candidate) -> Clock | Measurement:
        """A kernel that gave the right result, or the measurement that says what is wrong."""
        assert self.work is not None
        try:
            built = candidate in self._built
            kernel = self._built.pop(candidate) if built else self.device.load(self.work, candidate)
            clock = Clock(kernel, self.rotation)
            reason = check(clock)
        except Exception as error:  # a compiler or a driver raises what it likes
            return _failed(candidate, error)
        return Measurement(candidate, "wrong", error=reason[:_WORDS]) if reason else clock

    def measure(self, candidate: Candidate, plan: Plan) -> Measurement:
        """One candidate."""
        clock = self.clock(candidate)
        if isinstance(clock, Measurement):
            return clock
        cold, warm = time_kernel(clock, plan)
        return Measurement(candidate, "ok", cold, warm)

    def compare(self, candidates: list[Candidate], plan: Plan) -> list[Measurement]:
        """Those that are right, in turns."""
        clocks = [self.clock(candidate) for candidate in candidates]
        times = iter(time_in_turns([c for c in clocks if isinstance(c, Clock)], plan))
        found = []
        for candidate, clock in zip(candidates, clocks, strict=True):
            found.append(clock if isinstance(clock, Measurement) else Measurement(candidate, "ok", *next(times)))
        return found


def _failed(candidate: Candidate, error: Exception) -> Measurement:
    return Measurement(candidate, "failed", error=f"{type(error).__name__}: {error}"[:_WORDS])


def serve(open_device: Callable[[TargetSpec], Device]) -> None:
    """Answers requests until stdin closes. What compilers and drivers print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # drivers remark on every compilation
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                from awq_compile.targets import resolve_target

                worker = Worker(open_device(resolve_target(request["target"])))
                answer: dict[str, Any] = {"device": asdict(worker.device.fingerprint)}
                answer["where"] = getattr(worker.device, "where", "")  # the address of one that is elsewhere
            else:
                assert worker is not None
                answer = _answer(worker, request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:_WORDS], "hint": getattr(error, "hint", None)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "roof":
        return {"roof": asdict(worker.device.roof())}
    if request["do"] == "work":
        work = Work(decode_problem(request["problem"]), request["bucket"], request["rows"])
        worker.prepare(work, request["seed"])
        return {"ready": True}
    if request["do"] == "build":
        failed = worker.build(decode_candidate(request["schedule"]))
        return {"built": True} if failed is None else failed.to_json()
    plan = Plan(**request["plan"])
    if request["do"] == "compare":
        found = worker.compare([decode_candidate(s) for s in request["schedules"]], plan)
        return {"found": [m.to_json() for m in found]}
    return worker.measure(decode_candidate(request["schedule"]), plan).to_json()


def main() -> None:
    """The worker of this machine's devices."""
    from awq_compile.tuning.devices import open_device

    serve(open_device)


if __name__ == "__main__":
    main()
