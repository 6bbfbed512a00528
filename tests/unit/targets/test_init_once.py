"""The function that we bring for runtimes without it makes a handle once, from any thread, and tells failures."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from awq_compile.contract.objects import read_objects
from awq_compile.targets.link import init_once_object

INIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("once")
    built = init_once_object("x86_64-linux-gnu", folder)
    library = folder / "once.so"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-shared", "-o", str(library), str(built)], check=True)
    ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi(), ctypes.RTLD_GLOBAL)  # for the error's function
    return ctypes.CDLL(str(library)).TVMFFIHandleInitOnce


def test_threads_make_one_handle(function: Any) -> None:
    handle, made = ctypes.c_void_p(), []

    @INIT
    def slow(result: Any) -> int:
        time.sleep(0.05)
        made.append(1)
        result[0] = 42
        return 0

    threads = [threading.Thread(target=function, args=(ctypes.byref(handle), slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and handle.value == 42 and function(ctypes.byref(handle), slow) == 0


def test_failures_leave_no_handle_and_no_lock(function: Any) -> None:
    handle = ctypes.c_void_p()
    assert function(ctypes.byref(handle), INIT(lambda _: -7)) == -7
    assert function(ctypes.byref(handle), INIT(lambda _: 0)) == -1
    assert handle.value is None

    @INIT
    def good(result: Any) -> int:
        result[0] = 1
        return 0

    assert function(ctypes.byref(handle), good) == 0 and handle.value == 1


@pytest.mark.parametrize("triple", ["aarch64-linux-android", "arm64-apple-ios"])
def test_it_asks_for_nothing_but_tvm(triple: str, tmp_path: Path) -> None:
    (found,) = read_objects(init_once_object(triple, tmp_path))
    assert found.defined == {"TVMFFIHandleInitOnce"} and found.undefined == {"TVMFFIErrorSetRaisedFromCStrParts"}
