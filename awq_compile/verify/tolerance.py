"""How far a kernel may be from the exact result: one table, from which every bound is derived.

Names after Higham, *Accuracy and Stability of Numerical Algorithms*: u is the unit roundoff of a type, and a
sum of k terms t computed in any order is within (k + 8) u Σ|t| (3.1; 8 covers the few operations around it).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

ROUNDOFF: Final = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST: Final = {"float16": 2.0**-25, "float32": 2.0**-126, "float64": 0.0}  # denormals of float32 may be flushed
# Relative error of exp2, exp, log2, sin, cos, pow and division on a device. OpenCL C 3.0, table 67, allows up to
# 16 ulp (pow), Vulkan's precision of exp2 is 3 + 2|x| ulp with |x| below 8 where the result matters.
FUNCTION: Final = 2.0**-19

PRINTED: Final = 2.0**-20  # relative error of a constant: TVM's C-like generators print seven digits


def stored(value: npt.ArrayLike, dtype: str) -> F64:
    """Rounding of `value` when it is stored in `dtype`; nothing for integers."""
    if dtype not in ROUNDOFF:
        return np.zeros(np.shape(value))
    return np.asarray(1.01 * ROUNDOFF[dtype] * np.abs(value) + SMALLEST[dtype], np.float64)


def summed(terms: int, magnitude: npt.ArrayLike, dtype: str = "float32") -> F64:
    """Of a sum of `terms` terms kept in `dtype`, where the terms' absolute values sum to `magnitude`."""
    return np.asarray((terms + 8) * ROUNDOFF[dtype] * np.asarray(magnitude, np.float64), np.float64)


def within(found: npt.NDArray[Any], expected: F64, bound: npt.ArrayLike) -> tuple[float, float, str]:
    """(largest error, its bound, "" or what is wrong) of `found` against `expected`, elementwise."""
    wide = found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where(wide == expected, 0.0, np.abs(wide - expected))
    allowed = np.broadcast_to(np.asarray(bound, np.float64), error.shape)
    if not error.size:
        return 0.0, 0.0, ""
    bad = ~(error <= allowed)  # NaN is bad
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(bad, np.inf, np.where(error == 0, 0.0, error / allowed))
    where = np.unravel_index(int(np.argmax(ratio)), error.shape)
    reason = ""
    if bad.any():
        at = ", ".join(map(str, where))
        reason = f"{int(bad.sum())} of {error.size} differ: [{at}] is {wide[where]:.6g}, expected {expected[where]:.6g}"
    return float(error[where]), float(allowed[where]), reason
