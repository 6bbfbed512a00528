"""Stands in for Ray in a driver: a cluster of one worker, whose ills are in the address and in what jobs say.

`AILING` is a JSON object: ill → a piece of the text of the jobs that suffer from it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

HANGS, REFUSES, DIES = (f"127.0.0.1:{port}" for port in (1, 2, 3))
AILING = json.loads(os.environ.get("FAKE_RAY_AILING", "{}"))


class WorkerCrashedError(Exception):
    """See Ray."""


class NodeDiedError(Exception):
    """See Ray."""


class OutOfMemoryError(Exception):
    """See Ray."""


exceptions = SimpleNamespace(
    WorkerCrashedError=WorkerCrashedError, NodeDiedError=NodeDiedError, OutOfMemoryError=OutOfMemoryError
)
pool = ThreadPoolExecutor(1)


def init(address: str, **options: Any) -> None:
    """As `ray.init`."""
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ("include_dashboard" in options) == (address == "local")
    if address == HANGS:
        time.sleep(1000)
    if address == REFUSES:
        raise ConnectionError("Could not find\nany running Ray instance.")
    if address == DIES:
        print("Failed to connect to GCS", file=sys.stderr)
        os._exit(1)


class Reference:
    """As `ray.ObjectRef`."""

    def __init__(self, found: Future[Any]) -> None:
        self.found = found

    def future(self) -> Future[Any]:
        """As of Ray."""
        return self.found


def remote(**options: Any) -> Callable[[Any], Any]:
    """As the decorator, for a function of a module that a node can import."""
    assert options["num_cpus"] == 1

    def decorate(function: Callable[[str], bytes]) -> Any:
        assert function.__module__ != "__main__"

        def submit(job: str) -> Reference:
            ills = {ill for ill, piece in AILING.items() if piece in job}
            if "gone" in ills:
                os._exit(1)
            if "hangs" in ills:
                return Reference(Future())
            return Reference(pool.submit(run, job, ills))

        def run(job: str, ills: set[str]) -> bytes:
            if "crashes" in ills:
                raise WorkerCrashedError("The worker died\nunexpectedly")
            if "lacks" in ills:
                raise RuntimeError("ray::build()\n  File\nModuleNotFoundError: No module named 'awq_compile'")
            return function(job)

        return SimpleNamespace(remote=submit)

    return decorate


def cancel(reference: Reference, *, force: bool) -> None:
    """As `ray.cancel`."""
    assert force
    if not reference.found.done():
        reference.found.set_exception(WorkerCrashedError("cancelled"))


def shutdown() -> None:
    """As `ray.shutdown`."""
