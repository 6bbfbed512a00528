"""`MatmulProblem`: what a quantised linear must compute, as data. The key of the tuning database."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec

ACTIVATIONS: Final = ("none", "relu", "silu_mul")


@dataclass(frozen=True)
class Epilogue:
    """What happens to acc = x Wᵀ before it is stored, in this order: + bias, activation, + residual.

    With `silu_mul`, W has 2N rows, gate over up, and y[:, n] = silu(acc[:, n]) * acc[:, n + N]. `wide` stores y in
    float32, whatever the type of x: logits in float16 are often equal where they should not be.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        assert self.activation in ACTIVATIONS, self.activation
        assert not (self.bias and self.activation == "silu_mul"), "a bias before silu_mul would have 2N elements"

    @property
    def name(self) -> str:
        """For example `bias_silu_mul`; empty when nothing is fused."""
        parts = {"bias": self.bias, self.activation: self.activation != "none"}
        parts |= {"residual": self.residual, "wide": self.wide}
        return "_".join(part for part, there in parts.items() if there)


@dataclass(frozen=True)
class MatmulProblem:
    """y (M, N) = epilogue(x (M, K) @ Wᵀ), W in the packed form of `spec`. M is dynamic.

    `n` counts the outputs: with `silu_mul` the weight has 2n rows. `dtype` is that of x, of y unless it is wide, and of
    the arithmetic; sums are kept in float32.
    """

    n: int
    k: int
    spec: WeightSpec
    epilogue: Epilogue = Epilogue()
    dtype: str = "float32"

    @property
    def out_dtype(self) -> str:
        """Type of y."""
        return "float32" if self.epilogue.wide else self.dtype

    @property
    def weight_rows(self) -> int:
        """Rows of W."""
        return 2 * self.n if self.epilogue.activation == "silu_mul" else self.n

    @property
    def weight_nbytes(self) -> int:
        """Bytes of W that one pass over it reads, scales and zero points included."""
        return self.spec.nbytes(self.weight_rows, self.k)

    @property
    def name(self) -> str:
        """A C identifier, unique to the problem."""
        tail = f"_{self.epilogue.name}" if self.epilogue.name else ""
        kind = self.spec.name if isinstance(self.spec, QuantSpec | Float16Spec) else ""
        return f"qmatmul_{kind}_n{self.n}_k{self.k}{tail}" + ("" if self.dtype == "float32" else f"_{self.dtype}")


def encode_problem(problem: MatmulProblem) -> str:
    """A `MatmulProblem` as a JSON string."""
    return json.dumps(asdict(problem), sort_keys=True)


def decode_problem(text: str) -> MatmulProblem:
    """Inverse of `encode_problem`."""
    data = json.loads(text)
    spec = data["spec"]
    data["spec"] = QuantSpec(**spec) if "bits" in spec else Float16Spec(**spec)
    return MatmulProblem(**{**data, "epilogue": Epilogue(**data["epilogue"])})


SMALL_ROWS: Final = 8
ROW_BUCKETS: Final = {  # most rows of each
    "gemv": 1,
    "pair": 2,
    "quad": 4,
    "small": SMALL_ROWS,
    "medium": 16,
    "broad": 32,
    "large": 64,
    "wide": 256,
    "gemm": 1 << 31,
}
FEW_ROWS: Final = tuple(  # buckets whose kernels get few rows
    bucket for bucket, most in ROW_BUCKETS.items() if most <= SMALL_ROWS
)


def row_bucket(m: int) -> str:
    """Which bucket M rows belong to; where it has no kernel of its own, the next that has serves it."""
    return next(bucket for bucket, most in ROW_BUCKETS.items() if m <= most)


def serves(bucket: str, m: int) -> bool:
    """Whether a bucket's kernel may get M rows: also fewer, but not one, nor beyond `small` as few as that serves."""
    least = 0 if bucket == "gemv" else 1 if bucket in FEW_ROWS else SMALL_ROWS
    return least < m <= ROW_BUCKETS[bucket]
