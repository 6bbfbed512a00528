"""The float64 oracle: what a quantised linear must compute, in plain NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from awq_compile.formats import QuantizedMatrix, dequantize_matrix

F64 = npt.NDArray[np.float64]


def silu(x: F64) -> F64:
    """x * sigmoid(x)."""
    return np.asarray(x / (1.0 + np.exp(-x)), np.float64)


def linear(x: npt.NDArray[np.floating], weight: QuantizedMatrix) -> F64:
    """x (M, K) times the dequantised weight (N, K), transposed: (M, N)."""
    return np.asarray(np.asarray(x, np.float64) @ dequantize_matrix(weight, np.float64).T, np.float64)


def linear_bound(x: npt.NDArray[np.floating], weight: QuantizedMatrix, *, unit_roundoff: float) -> F64:
    """Elementwise bound on |computed - exact| of one linear whose sums are kept at `unit_roundoff`.

    γ_n Σ|x_k||w_k| with γ_n = n u (Higham, *Accuracy and Stability of Numerical Algorithms*, 3.1), where
    n = K + 8 counts the additions and the few roundings of one dequantised product; |w_k| are `magnitudes`.
    """
    k = weight.shape[1]
    return np.asarray((k + 8) * unit_roundoff * (np.abs(np.asarray(x, np.float64)) @ magnitudes(weight).T), np.float64)


def magnitudes(weight: QuantizedMatrix) -> F64:
    """(N, K) of the terms that kernels sum: those that sum codes before subtracting the zero point see |q| s and |z| s
    instead of |q - z| s, hence `codes + zero`."""
    weight = weight.in_order("NK")
    spec = weight.spec
    n, k = weight.shape
    codes = spec.layout.unpack(weight.q_weight).astype(np.float64).reshape(n, k // spec.group, spec.group)
    zero = spec.zero if weight.q_zero is None else weight.q_zero.astype(np.float64)[:, :, None]
    return np.asarray((codes + zero) * np.abs(weight.q_scale.astype(np.float64))[:, :, None]).reshape(n, k)
