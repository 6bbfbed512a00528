"""The driver of a Ray cluster, as a program, and the task that builds a candidate on a node.

Ray ends a driver whose cluster goes away, and starting one may hang: this process may be lost, the one that tunes
may not. A JSON object a line comes on stdin and goes to stdout:

    {"id": 1, "job": "{…}", "path": "/tmp/…/5e1f.so"}  → {"id": 1, "status": "ok"}, and the library is at `path`
                                                       → {"id": 1, "status": "failed", "error": "TVMError: …"}
                                                       → {"id": 1, "refused": "…", "hint": "…"}, no candidate's fault
    {"forget": true}                                   → nothing, for what was asked is not wanted any more

The answer 0 says that the cluster is there. Nodes are trusted: what they send is run on the devices.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from awq_compile import __version__, settings
from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.problem import decode_problem, encode_problem
from awq_compile.tuning.foreign import Candidate, decode_candidate, encode_candidate
from awq_compile.tuning.measure import Work
from awq_compile.tuning.record import tvm_version
from awq_compile.tuning.templates import VERSIONS

_WORDS: Final = 400  # of a compiler's message, as in `worker`
_STORE_BYTES: Final = 128 << 20  # for libraries on their way, where we start the cluster
_NODES: Final = "every node needs the same Python, ray and awq-compile: pip install 'awq-compile[ray]'"
_PROCESSOR: Final = "name the processor: --target cpu:TRIPLE@CPU, with LLVM's word for CPU"
HOW_TO_JOIN: Final = (
    "ray start --head on one machine, ray start --address=HOST:PORT on all others and, with --num-cpus=0, on this one"
)


def encode_job(target: str, work: Work | None = None, candidate: Candidate | None = None) -> str:
    """What a node is asked to build, as text; without a candidate, only whether it would build as is built here."""
    job: dict[str, Any] = {"target": target, "like": origin(target)}
    if work is not None and candidate is not None:
        job |= {"problem": encode_problem(work.problem), "bucket": work.bucket, "rows": work.rows}
        job["schedule"] = encode_candidate(candidate)
    return json.dumps(job)


@cache
def origin(target: str) -> dict[str, str]:
    """What must be equal here and on a node, for a library to be the one that would be built here."""
    from awq_compile.targets import resolve_target

    found = {"awq-compile": __version__, "apache-tvm": tvm_version()}
    found |= {f"the template {name}": str(version) for name, version in VERSIONS.items()}
    try:  # `cpu` is another target on another machine
        found[f"{target} as"] = json.dumps(resolve_target(target).tvm_target, sort_keys=True)
    except UsageError as error:
        found[f"{target} as"] = str(error)
    return found


def build(job: str) -> bytes:
    """The task: a line with the answer, then the library. What fails is an answer, for exceptions travel as pickles."""
    from awq_compile.runtime.lean_tvm import tvm  # noqa: F401 - before anything imports torch with it
    from awq_compile.targets import resolve_target
    from awq_compile.tuning.export import export_kernel, kernel_suffix

    wanted = json.loads(job)
    here, there = wanted["like"], origin(wanted["target"])
    if unlike := [name for name in here | there if here.get(name) != there.get(name)]:
        both = f"has {_listed(there, unlike)}, and the machine that asks has {_listed(here, unlike)}"
        hint = _PROCESSOR if unlike == [f"{wanted['target']} as"] else _NODES
        return _line({"refused": f"the Ray worker on {platform.node()} {both}", "hint": hint})
    if "schedule" not in wanted:
        return _line({"status": "ok"})
    spec = resolve_target(wanted["target"])
    work = Work(decode_problem(wanted["problem"]), wanted["bucket"], wanted["rows"])
    with tempfile.TemporaryDirectory(prefix="awq-ray-") as folder:
        path = Path(folder) / f"kernel{kernel_suffix(spec)}"
        try:
            export_kernel(work, decode_candidate(wanted["schedule"]), spec, path)
        except EnvironmentMissingError as error:
            return _line({"refused": f"the Ray worker on {platform.node()}: {error}", "hint": error.hint})
        except Exception as error:  # TVM raises what it likes
            return _line({"status": "failed", "error": f"{type(error).__name__}: {error}"[:_WORDS]})
        return _line({"status": "ok"}) + path.read_bytes()


def _listed(values: dict[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name, 'unknown')[:200]}" for name in names)


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def connect(address: str) -> Any:
    """Ray, connected to a cluster: `HOST:PORT`, `ray://HOST:PORT`, `auto`, or `local` to start one here."""
    import ray

    start: dict[str, Any] = {}
    if address == "local":
        start = {"num_cpus": settings.num_threads(), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **start)
    return ray


def serve(address: str) -> None:
    """Answers until stdin closes. What Ray prints goes to stderr."""
    from awq_compile.tuning.ray_driver import build as task  # by its name on the nodes: of __main__ Ray sends the code

    answers, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)

    def answer(number: int, found: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps({"id": number} | found) + "\n")
            answers.flush()

    try:
        ray = connect(address)
    except Exception as error:  # Ray raises what it likes
        answer(0, {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"[:_WORDS], "hint": HOW_TO_JOIN})
        return
    answer(0, {"status": "ok"})
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    running: dict[int, Any] = {}

    def finished(number: int, path: str | None, future: Any) -> None:
        running.pop(number, None)
        try:
            line, _, library = future.result().partition(b"\n")
            found = json.loads(line)
            if path is not None and found.get("status") == "ok":
                Path(path).write_bytes(library)
        except lost as error:
            found = {"status": "crashed", "error": _last_line(error)}
        except Exception as error:
            found = {"refused": _last_line(error), "hint": _NODES}
        answer(number, found)

    remote = ray.remote(num_cpus=1, max_retries=1)(task)  # a node that goes away is nobody's fault
    for line in sys.stdin:
        request = json.loads(line)
        if "forget" in request:
            for reference in list(running.values()):
                ray.cancel(reference, force=True)
        else:
            number = request["id"]
            running[number] = reference = remote.remote(request["job"])
            reference.future().add_done_callback(partial(finished, number, request.get("path")))
    ray.shutdown()


def _last_line(error: BaseException) -> str:
    """Of a message, which in Ray's errors is a node's traceback."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:_WORDS]


if __name__ == "__main__":
    serve(sys.argv[1])
