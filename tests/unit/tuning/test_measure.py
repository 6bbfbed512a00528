"""What a candidate does to its process never reaches ours, and is what its measurement says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_tuning import COMMAND, CRASHES, FAILS, GOOD, HANGS, PROBLEM, WORK, WRONG, fake

from awq_compile.errors import CompileError, EnvironmentMissingError
from awq_compile.formats import QuantizedMatrix, QuantSpec
from awq_compile.problem import Epilogue, MatmulProblem, row_bucket
from awq_compile.targets import resolve_target
from awq_compile.tuning.inputs import PERIOD, ROWS_PERIOD, make_inputs
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import Measurement, Plan, Times, Work
from awq_compile.tuning.runtime_device import RuntimeDevice
from awq_compile.tuning.timing import Clock, Rotation, in_turns, time_in_turns
from awq_compile.verify.oracles import linear as oracle

QUICK = Plan(limit=1.0)


@pytest.fixture
def measurer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalMeasurer]:
    monkeypatch.setenv("FAKE_DEVICE_LOG", str(tmp_path / "log"))
    with LocalMeasurer(resolve_target("opencl"), command=COMMAND) as found:
        yield found


def test_each_fate_is_told(measurer: LocalMeasurer, tmp_path: Path) -> None:
    """Crashing and hanging end the worker, and the next candidate gets a new one, prepared for the same work."""
    fates = (GOOD, CRASHES, WRONG, HANGS, FAILS, GOOD)
    found = list(measurer.measure(WORK, [fake(f, rows) for rows, f in zip(range(2, 14, 2), fates, strict=True)], QUICK))
    assert [m.status for m in found] == ["ok", "crashed", "wrong", "hung", "failed", "ok"]
    assert "signal 6" in found[1].error and "does not compile" in found[4].error
    assert [math.isfinite(m.seconds) for m in found] == [m.status == "ok" for m in found]
    assert found[5].cold is not None and found[5].cold.median == pytest.approx(12e-6, rel=1e-2)
    assert all(m.device == measurer.fingerprint() for m in found)
    assert (tmp_path / "log").read_text().split() == [WORK.name] * 3


def test_a_comparison_survives_its_members(measurer: LocalMeasurer) -> None:
    """Results keep the order of the schedules, and a crash does not take the others' times."""
    found = measurer.compare(WORK, [fake(GOOD, 4), fake(CRASHES), fake(WRONG), fake(GOOD, 2)], QUICK)
    assert [m.status for m in found] == ["ok", "crashed", "wrong", "ok"]
    assert found[0].seconds > found[3].seconds


def test_no_kernel_finds_the_weights_that_another_read() -> None:
    """Three kernels in turns over four copies: no cold run meets a copy that any of them read in the last three."""
    read: list[int] = []

    class Reading:
        def poison(self) -> None:
            pass

        def run(self, copy: int, *, cold: bool) -> float:
            read.extend([copy] if cold else [])
            return 1e-3

        def wrong(self) -> str:
            return ""

    rotation = Rotation(4)
    time_in_turns([Clock(Reading(), rotation, 1e-3) for _ in range(3)], Plan())
    assert len(read) > 12 and all(len(set(read[i : i + 4])) == 4 for i in range(len(read) - 3))


def test_a_device_of_tvms_runtime() -> None:
    """The CPU stands for a GPU: a kernel is exported, loaded, checked against the oracle and timed."""
    spec = resolve_target("cpu")
    work = Work(MatmulProblem(96, 128, QuantSpec(4, 32)), "gemv", 1)
    device, inputs = RuntimeDevice(spec), make_inputs(work)
    device.prepare(inputs)
    kernel = device.load(work, spec.rule(work.problem).gemv)
    assert kernel.run(0, cold=True) > 0 and kernel.run(0, cold=False) > 0
    assert kernel.wrong() == ""
    kernel.poison()  # or the next kernel of the work would be right without doing anything
    assert kernel.wrong() != ""
    device.prepare(replace(inputs, expected=inputs.expected + 1))
    kernel = device.load(work, spec.rule(work.problem).gemv)
    kernel.run(0, cold=True)
    assert kernel.wrong() != ""
    with pytest.raises(EnvironmentMissingError, match="TVM's runtime finds no metal device"):
        RuntimeDevice(resolve_target("metal"))


def test_a_worker_that_does_not_start_is_an_error() -> None:
    """The reason is what it printed."""
    command = [COMMAND[0], "-c", "raise SystemExit('no driver')"]
    failing = pytest.raises(EnvironmentMissingError, match="exit status 1")
    with LocalMeasurer(resolve_target("opencl"), command=command) as measurer, failing as caught:
        measurer.fingerprint()
    assert caught.value.hint == "no driver"


@pytest.mark.parametrize("order", ["NK", "KN"])
@pytest.mark.parametrize(("activation", "rows"), [("none", 3), ("silu_mul", 3), ("silu_mul", ROWS_PERIOD + 63)])
def test_the_repeated_rows_give_the_oracle_of_the_whole_matrix(order: str, activation: str, rows: int) -> None:
    """More rows than the periods; every output must be what the oracle says of the arrays that the kernel gets."""
    spec = QuantSpec(4, 32, symmetric=False, order=order)
    epilogue = Epilogue(activation=activation, residual=True)
    problem = MatmulProblem(PERIOD + 90, 64, spec, epilogue, "float16")
    inputs = make_inputs(Work(problem, row_bucket(rows), rows))
    acc, error = oracle.products(problem, inputs.x, QuantizedMatrix(spec, *inputs.weight))
    expected, bound = oracle.epilogue(problem, acc, error, None, inputs.extra[-1])
    np.testing.assert_allclose(inputs.expected, expected, rtol=1e-12)
    np.testing.assert_allclose(inputs.bound, bound)
    y = expected.astype(np.float16)
    assert inputs.wrong(y) == ""
    y[2, PERIOD] += np.float16(1)
    assert f"[2, {PERIOD}]" in inputs.wrong(y)
    assert inputs.wrong(inputs.output()) != ""
    assert inputs.wrong(expected.astype(np.float16), inputs.x + np.float16(1)) == "x was changed"


def test_turns_are_spread_evenly() -> None:
    """Every kernel gets its runs, and a kernel with few has them neither all at the start nor all at the end."""
    order = in_turns([6, 2, 0, 6])
    assert [order.count(i) for i in range(4)] == [6, 2, 0, 6]
    first, second = (i for i, at in enumerate(order) if at == 1)
    assert first < len(order) / 2 < second + 1
    assert order[:2] != order[2:4]  # the order within a round turns


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"},
        {"cold": {"median": -1, "low": 1, "high": 1, "count": 1}},
        {"schedule": {"template": "x"}},
        {},
    ],
)
def test_measurements_from_outside_are_checked(change: dict[str, object]) -> None:
    """A round trip keeps everything; each damage is refused."""
    good = Measurement(fake(GOOD), "ok", Times.of([1.0, 2.0, 3.0]), Times.of([1.0]))
    assert Measurement.from_json(good.to_json()) == good
    data = good.to_json() | change
    if not change:
        del data["cold"]
    with pytest.raises(CompileError):
        Measurement.from_json(data)


def test_rows_belong_to_their_bucket() -> None:
    """A work of eight rows is not a GEMV."""
    with pytest.raises(CompileError, match="8 rows"):
        Work(PROBLEM, "gemv", 8)
    assert replace(WORK, rows=1) == WORK
