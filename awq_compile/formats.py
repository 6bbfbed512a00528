"""Quantisation formats: `QuantSpec`, `PackedLayout`, `QuantScheme` and their NumPy pack and unpack.

A linear is y = W x with W of shape (N, K) = (out, in). A group is G consecutive elements along K that
share one scale; an element is stored as an unsigned code q of b bits and stands for

    w = (q - z) * s

with a float16 scale s per group. Symmetric specs have the constant z = 2^(b-1) - 1 and a *signed* scale,
so that all 2^b codes are used: the element of largest magnitude takes code 2^b - 1, which is 2^(b-1)
steps from zero. With b = 4 and G = 32 this is MLC's `q4f16_1`, (q - 7) * s, bit for bit.
Asymmetric specs store z as one uint8 per group, 0 <= z < 2^b, and a positive scale.

The arrays of a matrix lie in one of two orders. "NK": a row of W is a row of each array. "KN": the same arrays
transposed, so that neighbouring rows of W, which are neighbouring outputs, are neighbours in memory. With b = 4
and G = 32, KN is MLC's `q4f16_0`. Quantising and checkpoints know NK only; KN is repacked from the same codes.

Pure data and NumPy: this module imports neither torch nor tvm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import UsageError

BITS: Final = (3, 4, 8)
GROUPS: Final = (32, 64, 128)
ORDERS: Final = ("NK", "KN")
BLOCK: Final = 32  # elements along K that are packed together into `bits` uint32 words

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackedLayout:
    """How 32 consecutive codes along K become `bits` uint32 words.

    A code is split into planes of 1, 2, 4 or 8 bits that divide a word, lowest bits first, so that no
    code straddles two words. Plane p of width b_p takes b_p words of the block; within a plane element i
    sits in word `i // (32 / b_p)` at bit `(i % (32 / b_p)) * b_p`:

        4 bits: word j = e[8j] | e[8j+1] << 4 | … | e[8j+7] << 28            (MLC q4f16_1's order)
        8 bits: word j = e[4j] | e[4j+1] << 8 | e[4j+2] << 16 | e[4j+3] << 24
        3 bits: words 0, 1 hold the low two bits of 16 elements each, word 2 the high bit of all 32
    """

    bits: int

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Width in bits of each plane, lowest bits first."""
        return {3: (2, 1), 4: (4,), 8: (8,)}[self.bits]

    def words(self, k: int) -> int:
        """Number of uint32 words that hold a row of `k` codes; `k` is a multiple of 32."""
        if k % BLOCK:
            raise ValueError(f"a packed row needs a multiple of {BLOCK} elements, got {k}")
        return k // BLOCK * self.bits

    def code(self, word: Callable[[Any], Any], k: Any) -> Any:
        """Code of element `k` of a row, where `word(i)` gives the row's i-th uint32 word.

        Uses only `+ * // % >> & | <<`, so it evaluates on Python integers, NumPy arrays and TensorIR
        expressions alike: the one definition of the layout.
        """
        block, i = k // BLOCK, k % BLOCK
        value: Any = None
        first, shift = 0, 0
        for width in self.planes:
            per_word = BLOCK // width
            w = word(block * self.bits + first + i // per_word)
            part = (w >> ((i % per_word) * width)) & ((1 << width) - 1)
            value = part if value is None else value | (part << shift)
            first, shift = first + width, shift + width
        return value

    def pack(self, codes: U8) -> U32:
        """(N, K) uint8 codes below 2^bits → (N, K/32*bits) uint32 words."""
        n, k = codes.shape
        words = np.zeros((n, k // BLOCK, self.bits), np.uint32)
        if k % BLOCK:
            raise ValueError(f"a packed row needs a multiple of {BLOCK} elements, got {k}")
        wide = codes.reshape(n, k // BLOCK, BLOCK).astype(np.uint32)
        first, shift = 0, 0
        for width in self.planes:
            per_word = BLOCK // width
            part = (wide >> np.uint32(shift)) & np.uint32((1 << width) - 1)
            lanes = part.reshape(n, k // BLOCK, width, per_word)
            for j in range(per_word):
                words[:, :, first : first + width] |= lanes[..., j] << np.uint32(j * width)
            first, shift = first + width, shift + width
        return words.reshape(n, -1)

    def unpack(self, words: U32) -> U8:
        """(N, K/32*bits) uint32 words → (N, K) uint8 codes."""
        k = np.arange(words.shape[1] // self.bits * BLOCK, dtype=np.uint32)
        codes = self.code(lambda i: words[:, i], k)
        return np.asarray(codes, np.uint8)


@dataclass(frozen=True)
class QuantSpec:
    """Format of one quantised matrix: bits b, group G along K, symmetric or with stored zero points, and order.

    Arrays of a quantised (N, K) matrix: `q_weight` (N, K/32*b) uint32, `q_scale` (N, K/G) float16 and,
    unless symmetric, `q_zero` (N, K/G) uint8; each of them transposed with the order "KN".
    """

    bits: int
    group: int
    symmetric: bool = True
    order: str = "NK"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits must be one of {BITS}, got {self.bits}", hint="--bits 4")
        if self.group not in GROUPS:
            raise UsageError(f"group size must be one of {GROUPS}, got {self.group}", hint="--group-size 128")
        if self.order not in ORDERS:
            raise UsageError(f"the order must be one of {ORDERS}, got {self.order!r}", hint="--scheme w4g32kn")

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The constant zero point of symmetric specs, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def layout(self) -> PackedLayout:
        """How codes are packed into words."""
        return PackedLayout(self.bits)

    @property
    def name(self) -> str:
        """For example `w4g128` (symmetric), `w3g32a` (asymmetric), `w4g32kn` (symmetric, KN)."""
        return f"w{self.bits}g{self.group}{'' if self.symmetric else 'a'}{'kn' if self.order == 'KN' else ''}"

    @staticmethod
    def parse(name: str) -> QuantSpec:
        """Inverse of `name`."""
        match = re.fullmatch(r"w(\d)g(\d+)(a?)((?:kn)?)", name)
        if match is None:
            raise UsageError(f"unknown quantisation format {name!r}", hint="for example w4g128, w3g64a, w4g32kn")
        return QuantSpec(int(match[1]), int(match[2]), not match[3], "KN" if match[4] else "NK")

    def place(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Index in a stored array of what belongs to `row` of W and lies at `column` along K: the one definition."""
        return (row, column) if self.order == "NK" else (column, row)

    def in_order(self, order: str) -> QuantSpec:
        """The same format in another order."""
        return replace(self, order=order)

    def arrays(self, n: int, k: int) -> dict[str, tuple[tuple[int, int], str]]:
        """Suffix → (shape, dtype) of the arrays that hold an (n, k) matrix, in parameter order."""
        groups = k // self.group
        found: dict[str, tuple[tuple[int, int], str]] = {
            "q_weight": (self.place(n, self.layout.words(k)), "uint32"),
            "q_scale": (self.place(n, groups), "float16"),
        }
        if not self.symmetric:
            found["q_zero"] = (self.place(n, groups), "uint8")
        return found

    def nbytes(self, n: int, k: int) -> int:
        """Packed bytes of an (n, k) matrix, scales and zero points included."""
        return sum(rows * cols * np.dtype(dtype).itemsize for (rows, cols), dtype in self.arrays(n, k).values())


def packed_name(parameter: str, suffix: str) -> str:
    """Name of one packed array of a parameter: `a.b.weight` gives `a.b.q_weight`, and `w` gives `w.q_weight`."""
    return f"{parameter.removesuffix('.weight')}.{suffix}"


@dataclass(frozen=True)
class Float16Spec:
    """A matrix left in float16: one array, `weight` (N, K)."""

    name: str = "f16"

    def arrays(self, n: int, k: int) -> dict[str, tuple[tuple[int, int], str]]:
        """Suffix → (shape, dtype), as `QuantSpec.arrays`."""
        return {"weight": ((n, k), "float16")}

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an (n, k) matrix."""
        return 2 * n * k


WeightSpec = QuantSpec | Float16Spec


MLC_SCHEMES: Final = {"q4f16_1": "w4g32-h4", "q4f16_0": "w4g32kn-h4"}  # mlc_llm/quantization/quantization.py


@dataclass(frozen=True)
class QuantScheme:
    """Formats of a whole model: the layers' linears, and embedding and LM head.

    Named `w4g128`, or `w4g128-h8` and `w4g128-h4` when embedding and head are quantised too (same group
    and symmetry as the linears). The embedding is always NK, for it is read by rows; a head of its own has the
    order of the linears. Where MLC has a name for the same bytes, `q4f16_1` or `q4f16_0`, that is the name.
    """

    linear: QuantSpec
    head: WeightSpec = Float16Spec()

    @property
    def name(self) -> str:
        """Inverse of `parse`."""
        own = self.linear.name + (f"-h{self.head.bits}" if isinstance(self.head, QuantSpec) else "")
        return next((mlc for mlc, ours in MLC_SCHEMES.items() if ours == own), own)

    @property
    def mlc_name(self) -> str:
        """What mlc-chat-config.json calls it: MLC's `q4f16_2` is `w4g32`."""
        return {"w4g32": "q4f16_2"}.get(self.name, self.name)

    @property
    def lm_head(self) -> WeightSpec:
        """Format of a head that is not the embedding itself."""
        return self.head.in_order(self.linear.order) if isinstance(self.head, QuantSpec) else self.head

    @staticmethod
    def parse(name: str) -> QuantScheme:
        """`w4g128`, `w3g128a`, `w4g32-h4` or `q4f16_1`, …"""
        stem, dash, tail = MLC_SCHEMES.get(name, name).partition("-")
        linear = QuantSpec.parse(stem)
        if not dash:
            return QuantScheme(linear)
        if tail not in ("h4", "h8"):
            raise UsageError(
                f"unknown scheme {name!r}: {tail!r} after the dash", hint="-h4 or -h8, for example w4g32-h4"
            )
        return QuantScheme(linear, QuantSpec(int(tail[1]), linear.group, linear.symmetric))

    def in_order(self, order: str) -> QuantScheme:
        """The same codes with the linears in another order; checkpoints hold `in_order("NK")`."""
        return replace(self, linear=self.linear.in_order(order))


@dataclass(frozen=True)
class QuantizedMatrix:
    """One (N, K) matrix in packed form."""

    spec: QuantSpec
    q_weight: U32
    q_scale: F16
    q_zero: U8 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, groups = self.spec.place(*self.q_scale.shape)
        return n, groups * self.spec.group

    def in_order(self, order: str) -> QuantizedMatrix:
        """The same codes in another order."""
        if order == self.spec.order:
            return self
        arrays = {name: np.ascontiguousarray(array.T) for name, array in self.arrays().items()}
        return QuantizedMatrix(self.spec.in_order(order), **arrays)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Suffix → array, in the order of `QuantSpec.arrays`."""
        found: dict[str, npt.NDArray[Any]] = {"q_weight": self.q_weight, "q_scale": self.q_scale}
        if self.q_zero is not None:
            found["q_zero"] = self.q_zero
        return found


def quantize_matrix(codes: U8, scales: F16, zeros: U8 | None, spec: QuantSpec) -> QuantizedMatrix:
    """Packs codes (N, K), scales (N, K/G) and, for asymmetric specs, zeros (N, K/G)."""
    n, k = codes.shape
    if scales.shape != (n, k // spec.group) or (zeros is None) != spec.symmetric:
        raise ValueError(f"scales {scales.shape} and zeros do not fit codes {codes.shape} of {spec.name}")
    packed = spec.layout.pack(codes), np.ascontiguousarray(scales, np.float16), zeros
    return QuantizedMatrix(spec.in_order("NK"), *packed).in_order(spec.order)


def dequantize_matrix(matrix: QuantizedMatrix, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """w = (q - z) * s, computed in `dtype`, shape (N, K)."""
    matrix = matrix.in_order("NK")
    spec = matrix.spec
    n, k = matrix.shape
    codes = spec.layout.unpack(matrix.q_weight).astype(dtype).reshape(n, k // spec.group, spec.group)
    zero: Any = spec.zero if matrix.q_zero is None else matrix.q_zero.astype(dtype)[:, :, None]
    weight = (codes - zero) * matrix.q_scale.astype(dtype)[:, :, None]
    return np.asarray(weight, dtype).reshape(n, k)
