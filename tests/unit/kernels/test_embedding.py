"""Rows of a packed embedding are its dequantised rows, and ids outside the vocabulary are clipped."""

import numpy as np
import pytest
import tvm
from helpers_linear import arrays_of, random_matrix

from awq_compile.formats import Float16Spec, QuantizedMatrix, QuantSpec, WeightSpec, dequantize_matrix
from awq_compile.kernels.embedding import embedding_take


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32), QuantSpec(8, 64, False), QuantSpec(3, 32), Float16Spec()], ids=lambda s: s.name
)
def test_rows_are_dequantised(spec: WeightSpec) -> None:
    """Bit for bit in float32: one product and one subtraction of exact integers."""
    vocab, hidden = 37, 192
    matrix = random_matrix(spec, vocab, hidden, np.random.default_rng(0))
    table = dequantize_matrix(matrix) if isinstance(matrix, QuantizedMatrix) else matrix.astype(np.float32)
    function = embedding_take(spec, vocab, hidden, "float32").with_attr("global_symbol", "take")
    call = tvm.compile(tvm.IRModule({"take": function}), target="llvm")["take"]
    ids = np.array([0, 36, 5, 5, -3, 1000], np.int32)
    y = tvm.runtime.tensor(np.full((len(ids), hidden), np.nan, np.float32))
    call(tvm.runtime.tensor(ids), *(tvm.runtime.tensor(a) for a in arrays_of(matrix)), y)
    assert np.array_equal(y.numpy(), table[np.clip(ids, 0, vocab - 1)])
