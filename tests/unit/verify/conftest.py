"""The executors of this machine as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from awq_compile.verify.executors import opencl
from awq_compile.verify.executors.base import Executor
from awq_compile.verify.executors.opencl import OpenCLExecutor
from awq_compile.verify.executors.simt import SimtExecutor

KINDS = ("cuda", "metal", "opencl")


@pytest.fixture(params=KINDS, scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[tuple[str, Executor]]:
    """A target kind and what runs its code here."""
    if request.param != "opencl":
        yield request.param, SimtExecutor()
        return
    if (reason := opencl.missing()) is not None:
        pytest.skip(reason)
    executor = OpenCLExecutor(prefer="cpu")
    yield "opencl", executor
    executor.close()
