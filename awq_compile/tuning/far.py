"""Measures a bundle of compiled kernels; goes along with it as `measure.py`. Needs NumPy, tvm_ffi and libtvm_runtime.

    python measure.py [results.jsonl]

The library is looked for in `$TVM_LIBRARY_PATH`, then in the package tvm, which is not imported. Every kernel is run
in a child process that may crash or hang, and its result is compared with the expected one before it is timed. A run
that was stopped goes on where it ended.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

FINALISTS = 3
FLUSH_BYTES = 128 << 20  # copied before a cold run on a GPU
HERE = Path(__file__).resolve().parent
SHARE_ALL_CORES = -3  # TVM's ThreadGroup::kSpecifyThreadShareAllCore
TYPES = {"llvm": "cpu", "cuda": "cuda", "opencl": "opencl", "vulkan": "vulkan", "metal": "metal"}
DEVICE_NAME, UNITS = 5, 7  # TVM's DeviceAttrKind


def main() -> None:
    """The parent: one child for each candidate, and one for the best of a kernel, timed in turns."""
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "results.jsonl")
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    head = {name: bundle[name] for name in ("bundle", "target", "tvm", "templates")}
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    if lines and lines[0] != head:
        sys.exit(f"{results} holds the results of another bundle")
    with results.open("a", encoding="utf-8") as file:

        def keep(line: dict[str, Any]) -> None:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not lines:
            keep(head)
        for at, work in enumerate(bundle["works"]):
            name = {key: work[key] for key in ("problem", "bucket", "rows")}
            mine = [line for line in lines[1:] if all(line[key] == value for key, value in name.items())]
            for i in range(sum("found" in line for line in mine), len(work["candidates"])):
                found = measure(bundle, at, [i], bundle["search"])
                mine.append(name | {"found": found[0]})
                keep(mine[-1])
                print(f"{work['bucket']} {i + 1} of {len(work['candidates'])}: {words(found[0])}", flush=True)
            if not any("final" in line for line in mine):
                good = [i for i, line in enumerate(mine) if i and line["found"]["status"] == "ok"]
                good.sort(key=lambda i: mine[i]["found"]["cold"]["median"])
                keep(name | {"final": measure(bundle, at, [0, *good[:FINALISTS]], bundle["final"])})


def words(found: dict[str, Any]) -> str:
    """For people."""
    return f"{found['cold']['median'] * 1e6:.1f} µs" if found["status"] == "ok" else f"{found['status']}"


def measure(bundle: dict[str, Any], at: int, which: list[int], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What a child process finds; a candidate that ends it says how."""
    command = [sys.executable, str(HERE / "measure.py"), "--child", str(at), json.dumps(which), json.dumps(plan)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=plan["limit"] * len(which), cwd=HERE)
    except subprocess.TimeoutExpired:
        lost = {"status": "hung", "error": f"was still busy after {plan['limit']:g} s"}
    else:
        if done.returncode == 0:
            answer = json.loads(done.stdout.splitlines()[-1])
            if "missing" in answer:
                sys.exit(answer["missing"])
            return list(answer["found"])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        lost = {"status": "crashed", "error": f"ended by {how}"}
    candidates = bundle["works"][at]["candidates"]
    return [{"schedule": candidates[i]["schedule"], **lost} for i in which]


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


def child(at: int, which: list[int], plan: dict[str, Any]) -> dict[str, Any]:
    """Checks and times the kernels `which` of a work."""
    import numpy as np

    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    work = bundle["works"][at]
    try:
        runtime = Runtime(bundle["kind"])
    except (ImportError, OSError) as error:
        return {"missing": str(error)}
    device = runtime.fingerprint(bundle["machine"])
    arrays = [np.load(HERE / name, allow_pickle=False) for name in work["arrays"]]
    y, expected, bound = (np.load(HERE / name, allow_pickle=False) for name in work["expected"])
    arguments, output = [runtime.put(array) for array in arrays], runtime.put(y)
    found: list[dict[str, Any]] = []
    good: list[tuple[dict[str, Any], Any]] = []
    for i in which:
        candidate = work["candidates"][i]
        found.append({"schedule": candidate["schedule"], "status": "ok", "device": device})
        if "error" in candidate:
            found[-1] |= {"status": "failed", "error": candidate["error"]}
            continue
        try:
            module = runtime.ffi.load_module(str(HERE / candidate["file"]))
            runtime.fill(output, y)
            module.get_function("linear")(*arguments, output)
            got = runtime.get(output, y).astype(np.float64)
            if not (np.abs(got - expected) <= bound).all():
                found[-1] |= {"status": "wrong", "error": f"off by up to {np.nanmax(np.abs(got - expected)):g}"}
            elif not np.array_equal(runtime.get(arguments[0], arrays[0]), arrays[0]):
                found[-1] |= {"status": "wrong", "error": "x was changed"}
            else:
                good.append((found[-1], module))
        except Exception as error:  # a driver raises what it likes
            found[-1] |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400]}

    def clock(module: Any) -> Any:
        return lambda cold: runtime.seconds(module, [*arguments, output], cold=cold)

    clocks = [clock(module) for _, module in good]
    for (line, _), times in zip(good, in_turns(clocks, plan), strict=True):
        line |= times
    return {"found": found}


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
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4]))))
    else:
        main()
