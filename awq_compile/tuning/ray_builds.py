"""`RayBuilds`: a Ray cluster builds candidates, so that many devices are not held up by one machine's compiler."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final, Self

from awq_compile import settings
from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.export import kernel_suffix, library_name
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.measure import Measurement, Work
from awq_compile.tuning.ray_driver import HOW_TO_JOIN, encode_job
from awq_compile.tuning.tracker import Address

_ANSWER_SECONDS: Final = 15.0  # of a cluster that runs
_START_SECONDS: Final = 60.0  # of one that is started here
_NODE_SECONDS: Final = 120.0  # for a node to start a worker, which imports TVM
_END_SECONDS: Final = 10.0
_WORDS: Final = 300  # of what Ray says
_TOKEN: Final = "RAY_AUTH_MODE=token, with the token of the cluster's head in RAY_AUTH_TOKEN or ~/.ray/auth_token"


def check_address(text: str) -> str:
    """`text`, where it says which cluster: see `ray_driver.connect`. Raises `UsageError`."""
    if text not in ("auto", "local"):
        try:
            Address.parse(text.removeprefix("ray://"))
        except UsageError:
            raise UsageError(
                f"{text!r} is not the address of a Ray cluster", hint="HOST:PORT, ray://HOST:PORT, auto or local"
            ) from None
    return text


class RayBuilds:
    """See `Builds`. Raises `EnvironmentMissingError` where no cluster answers.

    A node that would build otherwise than this machine is found before a candidate is begun, where it is the first.
    """

    def __init__(self, address: str, spec: TargetSpec) -> None:
        if find_spec("ray") is None:
            raise EnvironmentMissingError(
                "the Python package 'ray' is missing, which builds on a cluster",
                hint="pip install awq-compile[ray]",
            )
        self.address, self.spec = address, spec
        self._suffix = kernel_suffix(spec)
        self._folder = tempfile.TemporaryDirectory(prefix="awq-ray-")
        self.folder = Path(self._folder.name)
        self._begun: dict[tuple[Work, Candidate], Future[dict[str, Any]]] = {}
        self._deadline = 0.0
        self._driver = _Driver([sys.executable, "-m", "awq_compile.tuning.ray_driver", address])
        self._finalizer = weakref.finalize(self, self._driver.end)
        try:
            started = _START_SECONDS if address == "local" else _ANSWER_SECONDS
            self._answer(self._driver.started, started, "does not answer")
            asked = self._driver.ask({"job": encode_job(spec.name)})
            self._answer(asked, _NODE_SECONDS, "has no node that is free to build")
        except BaseException:
            self.close()
            raise

    def begin(self, jobs: Sequence[tuple[Work, Candidate]], limit: float) -> None:
        """See `Builds`."""
        self.forget()
        # A cluster of one processor builds one after the other.
        self._deadline = time.monotonic() + limit * len(jobs)
        for work, candidate in jobs:
            path = self.folder / library_name(work, candidate, self._suffix)
            request = {"job": encode_job(self.spec.name, work, candidate), "path": str(path)}
            self._begun[work, candidate] = self._driver.ask(request)

    def library(self, work: Work, candidate: Candidate) -> Path | Measurement:
        """See `Builds`."""
        left = max(0.0, self._deadline - time.monotonic())
        try:
            answer = self._checked(self._begun[work, candidate].result(left))
        except TimeoutError:
            return Measurement(candidate, "hung", error=f"was still being built on the Ray cluster at {self.address}")
        except EOFError:
            raise self._gone() from None
        if answer["status"] != "ok":
            return Measurement(candidate, answer["status"], error=answer["error"])
        return self.folder / library_name(work, candidate, self._suffix)

    def forget(self) -> None:
        """See `Builds`."""
        if self._begun:
            for future in self._begun.values():
                future.cancel()
            self._begun = {}
            self._driver.tell({"forget": True})
        for path in self.folder.iterdir():
            path.unlink()

    def close(self) -> None:
        """Ends the driver, and the cluster where it was started here."""
        self._finalizer()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, future: Future[dict[str, Any]], seconds: float, late: str) -> None:
        try:
            self._checked(future.result(seconds))
        except TimeoutError:
            said = self._driver.said()
            raise EnvironmentMissingError(
                f"the Ray cluster at {self.address} {late} within {seconds:g} s{said and ': ' + said}",
                hint=_TOKEN if "AuthToken" in said else HOW_TO_JOIN,
            ) from None
        except EOFError:
            raise self._gone() from None

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "refused" in answer:
            raise EnvironmentMissingError(
                f"nothing is built on the Ray cluster at {self.address}: {answer['refused']}", hint=answer["hint"]
            )
        return answer

    def _gone(self) -> EnvironmentMissingError:
        return EnvironmentMissingError(
            f"the Ray cluster at {self.address} is gone: {self._driver.said() or 'its driver ended'}",
            hint="ray status; a search that is started again goes on where it ended",
        )


class _Driver:
    """The process that speaks to the cluster, see `ray_driver`; `started` is its answer 0.

    A future that it does not answer any more raises `EOFError`.
    """

    def __init__(self, command: list[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = settings.environment() | {"RAY_USAGE_STATS_ENABLED": "0"}
        # In a session of its own: Ctrl-C is for the parent, which ends it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._lock = threading.Lock()
        self._ended = False
        self.started: Future[dict[str, Any]] = Future()
        self._waiting = {0: self.started}
        self._asked = 0
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def ask(self, request: dict[str, Any]) -> Future[dict[str, Any]]:
        """The answer, when it comes."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._asked += 1
            number = self._asked
            self._waiting[number] = future
        if not self.tell({"id": number} | request):
            self._end_of_answers()
        return future

    def tell(self, request: dict[str, Any]) -> bool:
        """Writes a line; whether somebody may read it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            return False
        return not self._ended

    def said(self) -> str:
        """The last line that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines() or [""]
        return lines[-1][:_WORDS]

    def end(self) -> None:
        """Lets it take leave of the cluster, or kills it with what it started."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(_END_SECONDS if self.started.done() else 0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                answer = json.loads(line)
                with self._lock:
                    future = self._waiting.pop(answer.pop("id"))
                with contextlib.suppress(InvalidStateError):  # it is not wanted any more
                    future.set_result(answer)
        self._end_of_answers()

    def _end_of_answers(self) -> None:
        with self._lock:
            self._ended = True
            futures = list(self._waiting.values())
            self._waiting.clear()
        for future in futures:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(EOFError())
