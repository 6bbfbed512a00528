"""How many threads TVM's kernels use."""

from __future__ import annotations

import os

from awq_compile.runtime.lean_tvm import tvm
from awq_compile.settings import num_threads

_SHARE_ALL_CORES = -3  # TVM's ThreadGroup::kSpecifyThreadShareAllCore


def use_threads(count: int | None = None) -> int:
    """Makes kernels called from this thread use `count` threads (default `settings.num_threads()`); returns how many.

    TVM's own default is half of the processors on x86-64, one on a machine with two. Its pool belongs to
    the calling thread and never grows, so this must come before the first parallel kernel: pools that
    other threads start later read the environment variable.
    """
    wanted = count or num_threads()
    os.environ["TVM_NUM_THREADS"] = str(wanted)
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    # TVM takes as many workers as processors are listed; with more threads than processors they share.
    cpus = [str(allowed[i % len(allowed)]) for i in range(max(wanted, len(allowed)))]
    tvm.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, wanted, cpus)
    return int(tvm.get_global_func("runtime.NumThreads")())
