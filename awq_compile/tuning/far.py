"""Measures a bundle of compiled kernels; goes along with it as `measure.py`. Needs NumPy, tvm_ffi and libtvm_runtime.

    python measure.py [results.jsonl] [--seconds 300]

The library is looked for in `$TVM_LIBRARY_PATH`, then in the package tvm, which is not imported. Kernels are run in a
child process that may crash or hang, and each result is compared with the expected one before it is timed. A run that
was stopped goes on where it ended; after so many seconds, only the kernel in hand is brought to an end.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINALISTS = 3
FLUSH_BYTES = 128 << 20  # copied before a cold run on a GPU
HERE = Path(__file__).resolve().parent
SHARE_ALL_CORES = -3  # TVM's ThreadGroup::kSpecifyThreadShareAllCore
TYPES = {"llvm": "cpu", "cuda": "cuda", "opencl": "opencl", "vulkan": "vulkan", "metal": "metal"}
DEVICE_NAME, UNITS = 5, 7  # TVM's DeviceAttrKind


def main() -> None:
    """The parent: asks a child for one candidate after the other, then for the best of a kernel, timed in turns."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results.jsonl"))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bundle = read_bundle(HERE / "bundle.json")
    if options.child:
        answer_requests(bundle)
    else:
        measure_all(bundle, options.results, options.seconds)


def read_bundle(path: Path) -> dict[str, Any]:
    """What is measured. A file that was damaged on its way here ends the program."""
    try:
        bundle: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("bundle", "target", "tvm", "templates", "kind", "machine"):
            bundle[name]
        for plan in ("search", "final"):
            float(bundle[plan]["limit"])
        for work in bundle["works"]:
            for name in ("problem", "bucket", "rows", "arrays", "expected"):
                work[name]
            for candidate in work["candidates"]:
                candidate["schedule"], candidate.get("error") or candidate["file"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f"{path} is damaged: {error!r:.200}\ncopy the whole bundle here again")
    return bundle


def read_lines(results: Path) -> list[dict[str, Any]]:
    """What an earlier run found."""
    try:
        text = results.read_text(encoding="utf-8") if results.exists() else ""
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        for line in lines[1:]:
            for name in ("problem", "bucket", "rows"):
                line[name]
            for found in [line["found"]] if "found" in line else line["final"]:
                if found["status"] == "ok":
                    float(found["cold"]["median"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        sys.exit(f"{results} is damaged: {error!r:.200}\nremove it, and its measurements are made again")
    return lines


def measure_all(bundle: dict[str, Any], results: Path, seconds: float) -> None:
    """Adds to `results` what is not there yet, in the order of the bundle."""
    end = time.monotonic() + seconds
    head = {name: bundle[name] for name in ("bundle", "target", "tvm", "templates")}
    lines = read_lines(results)
    if lines and lines[0] != head:
        sys.exit(f"{results} holds the results of another bundle")
    with results.open("a", encoding="utf-8") as file, Child(bundle) as child:

        def keep(line: dict[str, Any]) -> None:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not lines:
            keep(head)
        for at, work in enumerate(bundle["works"]):
            name = {key: work[key] for key in ("problem", "bucket", "rows")}
            mine = [line for line in lines[1:] if all(line[key] == value for key, value in name.items())]
            if any("final" in line for line in mine):
                continue
            if time.monotonic() > end:
                return
            count = len(work["candidates"])
            for i in range(len(mine), count):
                if i and time.monotonic() > end:  # the untuned one is always measured
                    break
                found = child.measure(at, [i], bundle["search"])
                mine.append(name | {"found": found[0]})
                keep(mine[-1])
                print(f"kernel {at + 1}, {work['bucket']} {i + 1} of {count}: {words(found[0])}", flush=True)
            good = [i for i, line in enumerate(mine) if i and line["found"]["status"] == "ok"]
            good.sort(key=lambda i: mine[i]["found"]["cold"]["median"])
            keep(name | {"final": child.measure(at, [0, *good[:FINALISTS]], bundle["final"])})


def words(found: dict[str, Any]) -> str:
    """For people."""
    return f"{found['cold']['median'] * 1e6:.1f} µs" if found["status"] == "ok" else f"{found['status']}"


class Child:
    """A process that measures candidates. After one that crashed, hung or gave no right result comes a new one."""

    def __init__(self, bundle: dict[str, Any]) -> None:
        self.works = bundle["works"]
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int:
        """Ends the process if there is one; returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with process:  # closes the pipes and waits
            process.kill()
        return process.returncode

    def measure(self, at: int, which: list[int], plan: dict[str, Any]) -> list[dict[str, Any]]:
        """What it finds of the candidates `which` of a work."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "measure.py"), "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                cwd=HERE,
            )
        process, late = self.process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(plan["limit"] * len(which), kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([at, which, plan]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it ended before it read
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer = json.loads(line)
            if "missing" in answer:
                sys.exit(answer["missing"])
            found = list(answer["found"])
            if late.is_set() or any(each["status"] != "ok" for each in found):
                self.end()  # the device, or the arrays on it, may be left in any state
            return found
        if late.is_set():
            lost = {"status": "hung", "error": f"was still busy after {plan['limit']:g} s"}
            self.end()
        else:
            status = process.wait()
            self.end()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            lost = {"status": "crashed", "error": f"ended by {how}"}
        return [{"schedule": self.works[at]["candidates"][i]["schedule"], **lost} for i in which]


class Runtime:
    """TVM's runtime without its Python package."""

    def __init__(self, kind: str) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment] # tvm_ffi would import it, for nothing
        import tvm_ffi

        self.ffi: Any = tvm_ffi
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        spec = importlib.util.find_spec("tvm")
        folders = [Path(folder) / "lib" for folder in (spec.submodule_search_locations or [])] if spec else []
        if own := os.environ.get("TVM_LIBRARY_PATH"):
            folders.insert(0, Path(own))
        prefix = "" if sys.platform == "win32" else "lib"
        folder = next((f for f in folders if (f / f"{prefix}tvm_runtime{suffix}").exists()), None)
        if folder is None:
            raise OSError(f"{prefix}tvm_runtime{suffix} is not there: set TVM_LIBRARY_PATH to its folder")
        for name in ("tvm_runtime", f"tvm_runtime_{kind}"):
            if (path := folder / f"{prefix}{name}{suffix}").exists():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self.device = tvm_ffi.device(TYPES[kind], 0)
        self.type = int(self.device.dlpack_device_type())
        self.kind, self.cpu = kind, kind == "llvm"
        if not self.call("runtime.GetDeviceAttr", self.type, 0, 0):
            raise OSError(f"TVM's runtime finds no device of the kind {kind}")

    def call(self, name: str, *args: Any) -> Any:
        """A global function of the runtime's."""
        return self.ffi.get_global_func(name)(*args)

    def put(self, array: Any) -> Any:
        """A copy on the device."""
        made = self.call(
            "runtime.TVMTensorAllocWithScope", self.ffi.Shape(array.shape), str(array.dtype), self.device, None
        )
        self.fill(made, array)
        return made

    def fill(self, tensor: Any, array: Any) -> None:
        """Copies to the device."""
        self.call("runtime.TVMTensorCopyFromBytes", tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def get(self, tensor: Any, like: Any) -> Any:
        """A copy here."""
        import numpy as np

        array = np.empty_like(like)
        self.call("runtime.TVMTensorCopyToBytes", tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def seconds(self, module: Any, arguments: list[Any], *, cold: bool) -> float:
        """Of one run, after one that is not timed."""
        flush = FLUSH_BYTES if cold and not self.cpu else 0
        before = "cache_flush_cpu_non_first_arg" if cold and self.cpu else ""
        once = (1, 1, 0, 100, 0, 1)  # one run, one repeat, no least time, no pauses
        evaluator = self.call("runtime.RPCTimeEvaluator", module, "linear", self.type, 0, *once, flush, before)
        return float(struct.unpack("@d", bytes(evaluator(*arguments)))[0])

    def fingerprint(self, machine: str) -> dict[str, Any]:
        """The device's name."""
        if not self.cpu:
            name, units = (self.call("runtime.GetDeviceAttr", self.type, 0, kind) for kind in (DEVICE_NAME, UNITS))
            return {
                "name": str(name or self.kind),
                "kind": "gpu",
                "driver": f"TVM {self.kind}",
                "units": int(units or 0),
            }
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cores = [str(core) for core in allowed]
        self.call("runtime.config_threadpool", SHARE_ALL_CORES, len(cores), cores)
        info = Path("/proc/cpuinfo")
        text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
        match = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
        name = match[1].strip() if match else platform.processor() or platform.machine()
        return {"name": name, "kind": "cpu", "driver": f"{machine}, {len(cores)} threads", "units": len(cores)}


def answer_requests(bundle: dict[str, Any]) -> None:
    """The child: a line for each line, [work, candidates, plan]. Whatever else is printed goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    bench: Bench | None = None
    answer: dict[str, Any]
    for line in sys.stdin:
        at, which, plan = json.loads(line)
        try:
            if bench is None:
                bench = Bench(Runtime(bundle["kind"]), bundle)
            answer = {"found": bench.measure(at, which, plan)}
        except (ImportError, OSError) as error:
            answer = {"missing": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


@dataclass
class Arguments:
    """What the candidates of a work are run with, here and on the device, and what y must be."""

    x: Any
    y: Any
    expected: Any
    bound: Any
    given: list[Any]
    output: Any


def load(entry: dict[str, Any]) -> Any:
    """An array of which the first part is stored, where it repeats."""
    import numpy as np

    array = np.load(HERE / entry["file"], allow_pickle=False)
    for axis, length in enumerate(entry["shape"]):
        if array.shape[axis] != length:
            array = array.take(np.arange(length) % array.shape[axis], axis)
    return np.ascontiguousarray(array)


class Bench:
    """Checks and times kernels. The arrays of one work are kept for its next candidate."""

    def __init__(self, runtime: Runtime, bundle: dict[str, Any]) -> None:
        self.runtime, self.works = runtime, bundle["works"]
        self.device = runtime.fingerprint(bundle["machine"])
        self.at = -1
        self.arguments: Arguments | None = None

    def prepare(self, at: int) -> Arguments:
        """The arrays of a work."""
        if self.at != at or self.arguments is None:
            self.arguments = None  # the last work's go before the next ones come
            work = self.works[at]
            given = [load(entry) for entry in work["arrays"]]
            y, expected, bound = map(load, work["expected"])
            put = self.runtime.put
            self.at, self.arguments = at, Arguments(given[0], y, expected, bound, [*map(put, given)], put(y))
        return self.arguments

    def measure(self, at: int, which: list[int], plan: dict[str, Any]) -> list[dict[str, Any]]:
        """What becomes of the candidates `which`; those that give the right result are timed, in turns."""
        arguments, candidates = self.prepare(at), self.works[at]["candidates"]
        found: list[dict[str, Any]] = []
        good: list[tuple[dict[str, Any], Any]] = []
        for candidate in (candidates[i] for i in which):
            found.append({"schedule": candidate["schedule"], "status": "ok", "device": self.device})
            if "error" in candidate:
                found[-1] |= {"status": "failed", "error": candidate["error"]}
                continue
            try:
                module = self.runtime.ffi.load_module(str(HERE / candidate["file"]))
                if wrong := self.wrong(module, arguments):
                    found[-1] |= {"status": "wrong", "error": wrong}
                else:
                    good.append((found[-1], module))
            except Exception as error:  # a driver raises what it likes
                found[-1] |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400]}

        def clock(module: Any) -> Any:
            run_with = [*arguments.given, arguments.output]
            return lambda cold: self.runtime.seconds(module, run_with, cold=cold)

        clocks = [clock(module) for _, module in good]
        for (line, _), times in zip(good, in_turns(clocks, plan), strict=True):
            line |= times
        return found

    def wrong(self, module: Any, arguments: Arguments) -> str:
        """Runs a kernel over a poisoned y; what is wrong with the result, empty when nothing is."""
        import numpy as np

        runtime = self.runtime
        runtime.fill(arguments.output, arguments.y)
        module.get_function("linear")(*arguments.given, arguments.output)
        got = runtime.get(arguments.output, arguments.y).astype(np.float64)
        if not (np.abs(got - arguments.expected) <= arguments.bound).all():
            return f"off by up to {np.nanmax(np.abs(got - arguments.expected)):g}"
        return "" if np.array_equal(runtime.get(arguments.given[0], arguments.x), arguments.x) else "x was changed"


def in_turns(clocks: list[Any], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Cold and warm times of several kernels, as many of each, their runs among each other's."""
    first = [clock(True) for clock in clocks]
    slow = [seconds > plan["slow"] for seconds in first]
    counts = [
        1 if late else max(plan["least"], min(plan["most"], int(plan["cold_seconds"] / max(seconds, 1e-9))))
        for seconds, late in zip(first, slow, strict=True)
    ]
    cold: list[list[float]] = [[] for _ in clocks]
    for turn in range(max(counts, default=0)):
        for i in range(len(clocks)):
            at = (i + turn) % len(clocks)
            if turn < counts[at]:
                cold[at].append(clocks[at](True))
    warm_runs = [0 if late else plan["least"] for late in slow]
    warm = [[clock(False) for _ in range(runs)] for clock, runs in zip(clocks, warm_runs, strict=True)]
    return [{"cold": summary(c)} | ({"warm": summary(w)} if w else {}) for c, w in zip(cold, warm, strict=True)]


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    assert math.isfinite(median)
    return {"median": median, "low": low, "high": high, "count": len(seconds)}


if __name__ == "__main__":
    main()
