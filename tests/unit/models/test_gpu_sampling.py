"""The device's sampler as MLC's engine calls it: its order of calls, shapes and types, on a virtual machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest
import tvm
from helpers_vulkan import global_functions
from tvm import relax
from tvm.target import Target

from awq_compile.compiler import lower_passes, plan_passes, vm_passes
from awq_compile.models.gpu_sampling import GpuSampler, inplace_sampler_kernels, samples_on_device
from awq_compile.targets import resolve_target
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.launch_table import Table, run_prim_func
from awq_compile.verify.oracles import sampler as oracle

V = 33
TOP = 5  # probabilities that the engine asks for at most


def on_tensors(table: Table, executor: Any) -> Callable[..., None]:
    """A PrimFunc on TVM's tensors, by its launch table."""

    def call(*tensors: Any) -> None:
        arrays = [t.numpy() for t in tensors]
        run_prim_func(table, executor, arrays)
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.copyfrom(array)

    return call


@pytest.fixture(scope="module")
def vm() -> Iterator[Any]:
    """The functions in a virtual machine of this CPU, their kernels as Metal code."""
    sampler = GpuSampler(V)
    module, _ = sampler.export_tvm({n: {**a, "$": {"param_mode": "none"}} for n, a in sampler.specs().items()})
    for var in module.get_global_vars():
        if isinstance(module[var], relax.Function):
            module[var] = module[var].without_attr("num_input")
    for name, kernel in inplace_sampler_kernels(V).items():
        module[name] = kernel
    with hk.device_target("metal"):
        module = tvm.transform.Sequential([*lower_passes(), *plan_passes(), *vm_passes()])(module)
    builder = relax.ExecBuilder()
    kernels = relax.vm_build._filter_tir(relax.vm_build._vmcodegen(builder, module, "bytecode"))
    built, executor = hk.build(kernels, "metal"), SimtExecutor()
    executor.load(built.code)
    functions = {name: on_tensors(table, executor) for name, table in built.tables.items()}
    on_host = {str(v.name_hint) for v in kernels.get_global_vars()} - functions.keys()  # they compute sizes
    with global_functions({**functions, **{name: built.module[name] for name in on_host}}):
        yield relax.VirtualMachine(relax.vm_build._vmlink(builder, Target("llvm")), tvm.cpu())


def call(vm: Any, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """What a function returns."""
    result = vm[name](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays))
    return [t.numpy() for t in (result if hasattr(result, "__len__") else [result])]


def test_only_devices_on_which_the_engine_samples() -> None:
    """`Sampler::SupportGPUSampler`; elsewhere the functions would only cost time."""
    names = ("cuda", "vulkan", "metal", "opencl", "android", "cpu")
    assert [name for name in names if samples_on_device(resolve_target(name))] == ["cuda", "vulkan", "metal"]


def test_sampling_without_top_p(vm: Any) -> None:
    """One int32 for each sample; a row may be sampled several times."""
    probs = oracle.exact_probabilities(np.random.default_rng(0), 2, V)
    uniform, rows = np.float32([0.1, 0.7, 0.7]), np.int32([1, 0, 1])
    (drawn,) = call(vm, "multinomial_from_uniform", probs, uniform, rows)
    assert drawn.dtype == np.int32
    assert drawn.tolist() == [oracle.draw(probs[r].astype(float), float(u)) for r, u in zip(rows, uniform, strict=True)]


def test_sampling_with_top_p_and_logprobs(vm: Any) -> None:
    """argsort, sample, take: the results of one call are the arguments of the next, `probs` those before sorting."""
    probs = oracle.exact_probabilities(np.random.default_rng(1), 3, V)
    values, columns = call(vm, "argsort_probs", probs)
    assert (values.dtype, columns.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(values, -np.sort(-probs, axis=1))
    uniform, rows, top_p = np.float32([0.99, 0.4, 0.0]), np.int32([2, 0, 2]), np.float32([0.5, 1.0, 0.75])
    (drawn,) = call(vm, "sample_with_top_p", values, columns, uniform, rows, top_p)
    for token, u, row in zip(drawn, uniform, rows, strict=True):
        last = oracle.last_of_top_p(values[row].astype(float), float(top_p[row]))
        assert token == columns[row, oracle.draw(values[row, : last + 1].astype(float), float(u))]
    offsets = np.int32([row * V + rank for row in rows[:2] for rank in range(TOP)])
    sampled, top, tokens = call(vm, "sampler_take_probs", probs, columns, rows, drawn, offsets)
    np.testing.assert_array_equal(sampled, probs[rows, drawn])
    np.testing.assert_array_equal(top, np.concatenate([values[row, :TOP] for row in rows[:2]]))
    np.testing.assert_array_equal(tokens, np.concatenate([columns[row, :TOP] for row in rows[:2]]))


def test_logprobs_of_the_drawn_token_only(vm: Any) -> None:
    """No offsets at all, as when `top_logprobs` is 0."""
    probs = oracle.exact_probabilities(np.random.default_rng(2), 1, V)
    _, columns = call(vm, "argsort_probs", probs)
    sampled, top, tokens = call(vm, "sampler_take_probs", probs, columns, np.int32([0]), np.int32([7]), np.int32([]))
    assert sampled == probs[0, 7] and top.shape == tokens.shape == (0,)


def test_renormalising_takes_the_engines_pivots(vm: Any) -> None:
    """It passes where its own search would start, which changes nothing."""
    probs, top_p = oracle.exact_probabilities(np.random.default_rng(3), 2, V), np.float32([0.8, 0.3])
    for pivots in (np.float32([[0.2, 0.02, 0.01]] * 2), np.zeros((2, 3), np.float32)):
        (found,) = call(vm, "renormalize_by_top_p", probs, top_p, pivots)
        for row in range(2):
            expected = oracle.renormalize_top_p(probs[row].astype(float), float(top_p[row]))
            np.testing.assert_allclose(found[row], expected, rtol=1e-6)
