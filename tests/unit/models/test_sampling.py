"""Work on logits against NumPy, with the rows, counts and repeats that the MLC engine passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from helpers_build import build
from tvm import relax
from tvm.relax.frontend import nn

from awq_compile.models.sampling import inplace_kernels, softmax_active, softmax_name, softmax_with_temperature

V, H, TOKENS = 37, 12, 30
LOWEST = np.finfo(np.float32).min


class _Softmax(nn.Module):  # type: ignore[misc]
    def softmax_with_temperature(self, logits: Any, temperature: Any) -> Any:
        return softmax_with_temperature(logits, temperature, V)

    def of_padded(self, logits: Any, temperature: Any) -> Any:
        return softmax_with_temperature(logits, temperature, TOKENS)


@pytest.fixture(scope="module")
def vm() -> Any:
    arguments = {"logits": nn.spec.Tensor(["b", 1, V], "float32"), "temperature": nn.spec.Tensor(["b"], "float32")}
    names = ("softmax_with_temperature", "of_padded")
    module, _ = _Softmax().export_tvm({name: {**arguments, "$": {"param_mode": "none"}} for name in names})
    for name in names:
        module[name] = module[name].without_attr("num_input")
    for name, kernel in inplace_kernels(V, H, "float32").items():
        module[name] = kernel
    return relax.VirtualMachine(build(module), tvm.cpu())


def call(vm: Any, name: str, changed: np.ndarray, *arguments: np.ndarray, last: bool = False) -> np.ndarray:
    """Runs an in-place function; `changed` is its first or last argument. Returns it as left behind."""
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arguments]
    target = tvm.runtime.tensor(changed)
    function = vm.module.get_function(name, query_imports=True)  # as the MLC engine looks functions up
    function(*([*tensors, target] if last else [target, *tensors]))
    return target.numpy()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_softmax_with_temperature(vm: Any) -> None:
    """Each row has its temperature; 0 shares one evenly among the maxima; large logits do not overflow."""
    logits = np.random.default_rng(0).normal(size=(4, 1, V)).astype(np.float32) * 50
    logits[1, 0, [5, 9]] = 400.0
    temperature = np.array([1.0, 0.0, 0.3, 0.0], np.float32)
    got = vm["softmax_with_temperature"](tvm.runtime.tensor(logits), tvm.runtime.tensor(temperature)).numpy()
    for row in (0, 2):
        wide = logits[row, 0].astype(np.float64) / temperature[row]
        expected = np.exp(wide - wide.max())
        np.testing.assert_allclose(got[row, 0], expected / expected.sum(), atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(got[1, 0]), [5, 9])
    np.testing.assert_array_equal(got[1, 0, [5, 9]], 0.5)
    np.testing.assert_array_equal(got[3, 0], np.eye(V)[logits[3, 0].argmax()])


def test_padding_of_the_vocabulary_is_never_sampled(vm: Any) -> None:
    """Rows behind the tokenizer's last get 0, however large their logits: MLC's engine stops at such a token."""
    logits = np.random.default_rng(0).normal(size=(3, 1, V)).astype(np.float32)
    temperature = np.array([1.0, 0.0, 2.0], np.float32)
    small = vm["softmax_with_temperature"](tvm.runtime.tensor(_cut(logits)), tvm.runtime.tensor(temperature)).numpy()
    logits[:, :, TOKENS:] = 1e4
    got = vm["of_padded"](tvm.runtime.tensor(logits), tvm.runtime.tensor(temperature)).numpy()
    np.testing.assert_allclose(got, small, atol=1e-7)
    np.testing.assert_array_equal(got[:, :, TOKENS:], 0.0)


def test_the_name_of_a_softmax_says_what_is_padding() -> None:
    """Verification takes the size from there; TVM may append a number."""
    for name in (softmax_name(TOKENS, V), softmax_name(TOKENS, V) + "1"):
        assert softmax_active(name, V) == TOKENS
    assert softmax_active(softmax_name(V, V) + "1", V) == V
    assert softmax_active("apply_penalty_inplace", V) is None


def _cut(logits: np.ndarray) -> np.ndarray:
    cut = logits.copy()
    cut[:, :, TOKENS:] = -1e9
    return cut


def test_logit_bias(vm: Any) -> None:
    """Biases add up where a token comes twice; other logits stay."""
    logits = np.random.default_rng(1).normal(size=(3, V)).astype(np.float32)
    expected = logits.copy()
    expected[2, 4] += 3.5
    expected[0, 36] -= 1.0
    bias = np.array([1.5, -1.0, 2.0], np.float32)
    got = call(vm, "apply_logit_bias_inplace", logits, ints(2, 0, 2), ints(4, 36, 4), bias)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_penalties(vm: Any) -> None:
    """Presence and frequency are subtracted, then repetition shrinks positives and grows negatives."""
    logits = np.random.default_rng(2).normal(size=(4, V)).astype(np.float32)
    logits[3, 7], logits[1, 0] = 5.0, -1.0
    penalties = np.array([[0.5, 0.25, 1.5], [0.1, 0.2, 2.0]], np.float32)
    got = call(vm, "apply_penalty_inplace", logits, ints(3, 1), ints(0, 1), ints(7, 0), ints(2, 3), penalties)
    expected = logits.copy()
    expected[3, 7] = (5.0 - 0.5 - 2 * 0.25) / 1.5
    expected[1, 0] = (-1.0 - 0.1 - 3 * 0.2) * 2.0
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_bitmask(vm: Any) -> None:
    """Only the named rows are masked, by the bits of the same row of the mask; bit 31 of a word counts."""
    logits = np.random.default_rng(3).normal(size=(3, V)).astype(np.float32)
    allowed = np.random.default_rng(4).integers(0, 2, (3, 64)).astype(bool)
    allowed[2, 31], allowed[2, 30] = True, False
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    got = call(vm, "apply_bitmask_inplace", logits, ints(2, 0), words)
    expected = np.where(allowed[:, :V], logits, LOWEST)
    expected[1] = logits[1]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("what", "width"), [("probs", V), ("hidden_states", H)])
def test_gather_and_scatter(vm: Any, what: str, width: int) -> None:
    """Rows move by index; rows not named keep their values."""
    rows = np.random.default_rng(5).normal(size=(5, width)).astype(np.float32)
    got = call(vm, f"gather_{what}", np.zeros((2, width), np.float32), rows, ints(4, 1), last=True)
    np.testing.assert_array_equal(got, rows[[4, 1]])
    expected = rows.copy()
    expected[[3, 0]] = got
    np.testing.assert_array_equal(call(vm, f"scatter_{what}", rows, got, ints(3, 0), last=True), expected)
