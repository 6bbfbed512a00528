"""`LocalMeasurer`: this machine's device, in a child process that may crash, hang or be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, Self

from awq_compile import settings
from awq_compile.errors import EnvironmentMissingError
from awq_compile.problem import encode_problem
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate, encode_candidate
from awq_compile.tuning.measure import Measurement, Plan, Status, Work
from awq_compile.verify.executors.opencl import driver_environment

_START_SECONDS: Final = 120.0  # importing TVM and starting a driver on a busy machine
_PREPARE_SECONDS: Final = 300.0  # the oracle's results and copies of a matrix of a gigabyte


class LocalMeasurer:
    """One candidate at a time: a timing must not be disturbed by another or by a compilation.

    `command` starts the worker; `seed` that of the inputs.
    """

    capacity: Final = 1

    def __init__(self, spec: TargetSpec, *, seed: int = 0, command: Sequence[str] | None = None) -> None:
        self.spec = spec
        self.seed = seed
        self.command = list(command or (sys.executable, "-m", "awq_compile.tuning.worker"))
        self._child: _Child | None = None
        self._work: Work | None = None
        self._device: Fingerprint | None = None
        self.where = ""  # the device's address, where it has one

    def fingerprint(self) -> Fingerprint:
        """See `Measurer`."""
        self._started()
        assert self._device is not None
        return self._device

    def roof(self) -> Roof:
        """See `Measurer`."""
        answer = self._started().ask({"do": "roof"}, _START_SECONDS)
        return Roof(**self._expect(answer, f"the peak rates of {self.spec.name}")["roof"])

    def measure(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> Iterator[Measurement]:
        """See `Measurer`."""
        for schedule in schedules:
            request = {"do": "measure", "schedule": encode_candidate(schedule), "plan": asdict(plan)}
            answer = self._asked(work, request, plan.limit)
            if isinstance(answer, _Lost):
                yield Measurement(schedule, answer.status, error=answer.reason, device=self._device)
            else:
                yield replace(Measurement.from_json(answer), device=self._device)

    def build(self, work: Work, schedule: Candidate, plan: Plan) -> Measurement | None:
        """Builds what is measured later, or says what came of it."""
        answer = self._asked(work, {"do": "build", "schedule": encode_candidate(schedule)}, plan.limit)
        if isinstance(answer, _Lost):
            return Measurement(schedule, answer.status, error=answer.reason, device=self._device)
        return None if "built" in answer else replace(Measurement.from_json(answer), device=self._device)

    def compare(self, work: Work, schedules: Sequence[Candidate], plan: Plan) -> list[Measurement]:
        """See `Measurer`. Where one of them ends the worker, those that do not are compared without it."""
        request = {"do": "compare", "schedules": [encode_candidate(s) for s in schedules], "plan": asdict(plan)}
        answer = self._asked(work, request, plan.limit * max(1, len(schedules)))
        if not isinstance(answer, _Lost):
            return [replace(Measurement.from_json(found), device=self._device) for found in answer["found"]]
        alone = list(self.measure(work, schedules, plan))
        good = [m.schedule for m in alone if m.status == "ok"]
        if len(good) in (0, len(alone)):
            return alone
        again = iter(self.compare(work, good, plan))
        return [next(again) if m.status == "ok" else m for m in alone]

    def close(self) -> None:
        """See `Measurer`."""
        if self._child is not None:
            self._child.end()
        self._child = self._work = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, work: Work, request: dict[str, Any], limit: float) -> dict[str, Any] | _Lost:
        """The worker's answer, prepared for `work` first; a worker that is lost starts again at the next request."""
        child = self._prepared(work)
        answer = child.ask(request, limit)
        if isinstance(answer, _Lost):
            self.close()
        elif "error" in answer and "status" not in answer:  # the worker itself failed, not a candidate
            raise EnvironmentMissingError(
                f"measuring {work.name} for {self.spec.name} failed: {answer['error']}", hint=answer["hint"]
            )
        return answer

    def _prepared(self, work: Work) -> _Child:
        child = self._started()
        if self._work != work:
            self._work = None
            problem = encode_problem(work.problem)
            request = {"do": "work", "problem": problem, "bucket": work.bucket, "rows": work.rows, "seed": self.seed}
            self._expect(child.ask(request, _PREPARE_SECONDS), f"the inputs of {work.name}")
            self._work = work
        return child

    def _started(self) -> _Child:
        if self._child is None:
            environment = driver_environment(lockstep=True) if self.spec.has_device_code else settings.environment()
            self._child = _Child(self.command, environment)
            answer = self._child.ask({"do": "open", "target": self.spec.name}, _START_SECONDS)
            opened = self._expect(answer, f"the device of {self.spec.name}")
            self._device, self.where = Fingerprint(**opened["device"]), opened.get("where", "")
        return self._child

    def _expect(self, answer: dict[str, Any] | _Lost, what: str) -> dict[str, Any]:
        if isinstance(answer, _Lost):
            self.close()
            raise EnvironmentMissingError(f"{what}: the process that measures {answer.reason}", hint=answer.said)
        if "error" in answer:
            self.close()
            raise EnvironmentMissingError(f"{what}: {answer['error']}", hint=answer["hint"])
        return answer


class _Lost:
    """A worker that will not answer any more."""

    def __init__(self, status: Status, reason: str, said: str) -> None:
        self.status, self.reason, self.said = status, reason, said


class _Child:
    """A worker process. What it prints goes to a file, the end of which explains a crash."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        pipe = subprocess.PIPE
        # In a session of its own: Ctrl-C is for the parent, which ends the child.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, env=environment, start_new_session=True
        )
        self._left = b""
        self._finalizer = weakref.finalize(self, _end, self._process, self._log)

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any] | _Lost:
        """The answer, within `limit` seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + limit)
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
            return _Lost("crashed", how, self._said())
        if line is None:
            return _Lost("hung", f"was still busy after {limit:g} s", self._said())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """The next line; None when there is none before the deadline. Raises `EOFError`."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                if not (data := os.read(self._process.stdout.fileno(), 1 << 16)):
                    raise EOFError
                self._left += data
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _said(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace").strip()[-600:]

    def end(self) -> None:
        """Kills it."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes], log: Any) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for file in (process.stdin, process.stdout, log):
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()
