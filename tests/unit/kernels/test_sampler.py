"""The sampler's kernels, emitted for CUDA, Metal and Vulkan and run here, against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import helpers_kernels as hk
import numpy as np
import numpy.typing as npt
import pytest
import tvm
from helpers_vulkan import Built, executor, vulkan_target

from awq_compile.kernels.sampler.draw import draw, draw_top_p
from awq_compile.kernels.sampler.renormalize import renormalize_top_p
from awq_compile.kernels.sampler.sort import sort_rows
from awq_compile.kernels.sampler.verify_drafts import verify_drafts
from awq_compile.verify.case import Case, arrays_after, call_arguments, judge
from awq_compile.verify.cases import sampler as cases
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.launch_table import Table, run_prim_func
from awq_compile.verify.oracles import sampler as oracle
from awq_compile.verify.record import LaunchRecorder

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
# One element; less than a block; not a whole tile; three tiles, merged at once; five, merged twice.
SIZES = (1, 33, 1000, 4101, 8_200)
KERNELS: dict[str, tuple[Callable[[str, int], Any], Callable[..., Iterator[Case]]]] = {
    "sort": (sort_rows, cases.argsort),
    "draw": (draw, cases.draw),
    "draw_top_p": (draw_top_p, cases.draw_top_p),
    "renormalize": (renormalize_top_p, cases.renormalize),
    "verify_drafts": (verify_drafts, cases.verify_drafts),
}


@dataclass
class Device:
    """All kernels for one kind of device, in every size."""

    executor: Any
    tables: dict[str, Table]

    def run(self, kernel: str, size: int, *arguments: Any) -> None:
        """On arrays, which change."""
        run_prim_func(self.tables[f"{kernel}_{size}"], self.executor, arguments)

    def empty(self, count: int) -> I32:
        return np.full(count, -77, np.int32)

    def draw(self, probs: F32, uniform: Any, rows: Any) -> I32:
        """`multinomial_from_uniform`"""
        drawn = self.empty(len(rows))
        self.run("draw", probs.shape[1], probs, np.asarray(uniform, np.float32), np.asarray(rows, np.int32), drawn)
        return drawn


@pytest.fixture(params=["cuda", "metal", "vulkan"], scope="module")
def device(request: pytest.FixtureRequest) -> Device:
    kind, functions = request.param, {}
    for size in SIZES if request.param == "cuda" else (33, 4101):
        for name, (emit, _) in KERNELS.items():
            functions[f"{name}_{size}"] = emit(f"{name}_{size}", size)
    module = tvm.IRModule(functions)
    if kind != "vulkan":
        built = hk.build(module, kind)
        simt = SimtExecutor()
        simt.load(built.code)
        return Device(simt, built.tables)
    recorder = LaunchRecorder()
    gpu = executor("int64")
    gpu.load(Built(module, vulkan_target(), [recorder.instrument()]).shaders)
    return Device(gpu, recorder.tables)


def sizes_of(device: Device) -> list[int]:
    return sorted({int(name.rpartition("_")[2]) for name in device.tables})


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_size_is_right(device: Device, kernel: str) -> None:
    """What `verify` executes on a model's vocabulary holds for odd ones."""
    for size in sizes_of(device):
        table = device.tables[f"{kernel}_{size}"]
        for case in KERNELS[kernel][1](table, np.random.default_rng(size)):
            arguments = call_arguments(table, case)
            run_prim_func(table, device.executor, arguments)
            outcome = judge(case, arrays_after(arguments))
            assert not outcome.reason, f"{size} {case.label}: {outcome.reason}"


def softmax(rng: np.random.Generator, rows: int, size: int, spread: float) -> F32:
    e = np.exp(spread * rng.standard_normal((rows, size)))
    return np.asarray(e / e.sum(1, keepdims=True), np.float32)


def test_draws_are_within_rounding_of_the_cumulative_sum(device: Device) -> None:
    """On probabilities that do not add up exactly, u of any kind gives a possible token about where it belongs."""
    rng = np.random.default_rng(3)
    for size in sizes_of(device):
        probs = softmax(rng, 3, size, 4.0)
        probs[1, size // 2 :] = 0 if size > 1 else 1
        probs[2] *= np.float32(3.7)  # rows need not sum to 1
        uniform = np.concatenate([rng.random(60, np.float32), np.float32([0.0, 1 - 2.0**-24, 1.0])])
        rows = rng.integers(0, 3, len(uniform))
        drawn = device.draw(probs, uniform, rows)
        cumulative = np.concatenate([np.zeros((3, 1)), np.cumsum(probs.astype(np.float64), 1)], 1)
        total, u = cumulative[rows, -1], uniform.astype(np.float64)
        slack = 2.0**-20 * total
        assert (probs[rows, drawn] > 0).all()
        assert (cumulative[rows, drawn] <= u * total + slack).all()
        assert (cumulative[rows, drawn + 1] >= u * total - slack).all()


def test_draws_of_top_p_are_within_rounding_of_the_cumulative_sum(device: Device) -> None:
    """Nothing beyond the element that reaches top_p is ever drawn."""
    rng = np.random.default_rng(4)
    for size in sizes_of(device):
        values, columns = oracle.sort_descending(softmax(rng, 3, size, 3.0))
        top_p, rows = np.array([0.9, 0.3, 1e-5], np.float32), rng.integers(0, 3, 40)
        uniform = np.concatenate([rng.random(38, np.float32), np.float32([0.0, 1.0])])
        drawn = device.empty(40)
        arrays = (values, columns.astype(np.int32), uniform, rows.astype(np.int32), top_p, drawn)
        device.run("draw_top_p", size, *arrays)
        wide = values.astype(np.float64)
        places = np.argsort(columns, 1)[rows, drawn]
        for place, row, u in zip(places, rows, uniform.astype(np.float64), strict=True):
            cumulative = np.concatenate([[0], np.cumsum(wide[row])])
            last = oracle.last_of_top_p(wide[row], top_p[row] + 1e-6)
            assert place <= last
            slack = 2.0**-19 + cumulative[last + 1] - cumulative[oracle.last_of_top_p(wide[row], top_p[row] - 1e-6) + 1]
            goal = u * cumulative[last + 1]
            assert cumulative[place] - slack <= goal <= cumulative[place + 1] + slack


def test_a_row_without_a_sum_gives_a_column_all_the_same(device: Device) -> None:
    """Zeros and NaN: an index within the row, and no more is promised."""
    probs = np.zeros((2, 4101), np.float32)
    probs[1, 7] = np.nan
    assert set(device.draw(probs, [0.0, 0.999, 0.5], [0, 0, 1]).tolist()) <= set(range(4101))


def test_draws_have_the_probabilities_of_their_row(device: Device) -> None:
    """Pearson's chi-squared of 2000 draws, below its 99.9% point for 32 degrees of freedom; seeds are fixed."""
    rng = np.random.default_rng(5)
    probs = softmax(rng, 1, 33, 1.0)
    drawn = device.draw(probs, rng.random(2000, np.float32), np.zeros(2000))
    expected = 2000 * probs[0].astype(np.float64)
    assert ((np.bincount(drawn, minlength=33) - expected) ** 2 / expected).sum() < 62.5


def test_sorting_any_floats(device: Device) -> None:
    """Negative numbers, infinities and NaN come out once each, equal ones in their order; NaN is above all."""
    rng = np.random.default_rng(6)
    values = rng.choice([-np.inf, -2.5, -1e-42, 0.0, 1e-42, 1.5, np.inf], (2, 4101)).astype(np.float32)
    values[0, [5, 4000]] = np.nan
    result, columns = np.zeros_like(values), np.zeros(values.shape, np.int32)
    device.run("sort", 4101, values, result, columns)
    order = np.argsort(-np.where(np.isnan(values), 1e300, values.astype(np.float64)), 1, kind="stable")
    order[0] = np.concatenate([[5, 4000], order[0][~np.isin(order[0], [5, 4000])]])
    np.testing.assert_array_equal(columns, order)
    np.testing.assert_array_equal(result, np.take_along_axis(values, order, 1))


def test_renormalising_keeps_the_fewest_that_reach_top_p(device: Device) -> None:
    """On sums that round: what stays reaches top_p, and without its least it does not."""
    rng = np.random.default_rng(7)
    for size in sizes_of(device):
        probs = softmax(rng, 4, size, 3.0)
        probs[3] = 0
        top_p = np.array([0.9, 0.2, 1.0, 0.5], np.float32)
        result = np.full_like(probs, np.nan)
        device.run("renormalize", size, probs, top_p, result)
        for row in (0, 1):
            kept, wide = result[row] > 0, probs[row].astype(np.float64)
            goal = top_p[row] * wide.sum()
            assert wide[kept].min() >= wide[~kept].max(initial=0)
            assert wide[kept].sum() >= goal - 1e-6 > wide[wide > wide[kept].min()].sum() - 2e-6
            np.testing.assert_allclose(result[row], np.where(kept, wide / wide[kept].sum(), 0), rtol=1e-5)
        np.testing.assert_allclose(result[2], probs[2], rtol=1e-5)
        assert (result[3] == 0).all()


def test_a_tree_with_a_loop_ends(device: Device) -> None:
    """Each node is visited at most as often as there are nodes."""
    q, p = softmax(np.random.default_rng(8), 2, 33, 1.0), softmax(np.random.default_rng(9), 2, 33, 1.0)
    roots = np.array([0], np.int32)
    links = [np.array([1, 0], np.int32), np.array([0, 1], np.int32)]
    device.run("verify_drafts", 33, q, np.zeros(2, np.int32), p, *links, np.full(2, 0.5, np.float32), roots)
    assert roots[0] in (0, 1)
