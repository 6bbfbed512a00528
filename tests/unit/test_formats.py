"""Packing is exact, the layout is the documented one, and names identify formats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_compile.errors import UsageError
from awq_compile.formats import (
    BITS,
    GROUPS,
    MLC_SCHEMES,
    ORDERS,
    PackedLayout,
    QuantScheme,
    QuantSpec,
    dequantize_matrix,
    quantize_matrix,
)


@given(bits=st.sampled_from(BITS), n=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(bits: int, n: int, blocks: int, seed: int) -> None:
    """Every code comes back, and a row takes `bits` words per 32 elements."""
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, 32 * blocks)).astype(np.uint8)
    words = PackedLayout(bits).pack(codes)
    assert words.shape == (n, blocks * bits)
    assert np.array_equal(PackedLayout(bits).unpack(words), codes)


def test_four_bits_are_in_mlc_order() -> None:
    """Element i of a q4f16_1 row is nibble i % 8 of word i // 8 (MLC's group quantisation, NK)."""
    codes = (np.arange(64).reshape(1, 64) * 7 % 16).astype(np.uint8)
    words = PackedLayout(4).pack(codes)
    expected = [sum(int(codes[0, 8 * j + i]) << (4 * i) for i in range(8)) for j in range(8)]
    assert words.tolist() == [expected]


def test_eight_bits_are_bytes_in_memory_order() -> None:
    """On a little-endian machine INT8 rows are the codes themselves."""
    codes = np.arange(64, dtype=np.uint8).reshape(1, 64)
    assert np.array_equal(PackedLayout(8).pack(codes).view(np.uint8), codes)


def test_three_bits_are_planes() -> None:
    """Words 0 and 1 hold the low two bits, word 2 the high bit of each of 32 elements."""
    codes = (np.arange(32).reshape(1, 32) * 5 % 8).astype(np.uint8)
    low0, low1, high = (int(w) for w in PackedLayout(3).pack(codes)[0])
    for i in range(32):
        low = (low0 if i < 16 else low1) >> (2 * (i % 16)) & 3
        assert codes[0, i] == low | (high >> i & 1) << 2


def test_symmetric_codes_span_the_full_range_around_the_zero_point() -> None:
    """w = (q - 7) s at 4 bits: codes 0 and 15 are -7 s and 8 s."""
    spec = QuantSpec(4, 32)
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 1] = 15
    weight = dequantize_matrix(quantize_matrix(codes, np.array([[0.5]], np.float16), None, spec))
    assert weight[0, :2].tolist() == [-3.5, 4.0]


def test_kn_is_mlc_q4f16_0() -> None:
    """MLC packs q4f16_0 with q_weight[j, n] = sum over i of q[n, 8 j + i] << 4 i, and q_scale[g, n] (AWQ.md)."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (5, 96)).astype(np.uint8)
    scales = rng.standard_normal((5, 3)).astype(np.float16)
    matrix = quantize_matrix(codes, scales, None, QuantSpec(4, 32, order="KN"))
    words = [[sum(int(codes[n, 8 * j + i]) << (4 * i) for i in range(8)) for n in range(5)] for j in range(12)]
    assert matrix.q_weight.tolist() == words
    assert matrix.q_scale.tolist() == [[float(scales[n, g]) for n in range(5)] for g in range(3)]
    weight = dequantize_matrix(matrix)
    assert all(weight[n, k] == (int(codes[n, k]) - 7) * float(scales[n, k // 32]) for n in range(5) for k in range(96))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_orders_hold_the_same_codes(bits: int, symmetric: bool) -> None:
    """From NK to KN and back nothing changes, and shapes are those that the spec says."""
    rng = np.random.default_rng(bits)
    spec = QuantSpec(bits, 64, symmetric)
    codes = rng.integers(0, spec.levels, (7, 128)).astype(np.uint8)
    zeros = None if symmetric else rng.integers(0, spec.levels, (7, 2)).astype(np.uint8)
    nk = quantize_matrix(codes, rng.uniform(1, 2, (7, 2)).astype(np.float16), zeros, spec)
    kn = nk.in_order("KN")
    assert kn.spec.name == spec.name + "kn" and kn.shape == nk.shape == (7, 128)
    for name, array in kn.arrays().items():
        assert (array.shape, str(array.dtype)) == kn.spec.arrays(7, 128)[name]
        assert array.flags.c_contiguous and np.array_equal(array.T, nk.arrays()[name])
        assert np.array_equal(kn.in_order("NK").arrays()[name], nk.arrays()[name])
    assert np.array_equal(dequantize_matrix(kn), dequantize_matrix(nk))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_names_identify_specs(bits: int, group: int, symmetric: bool, order: str) -> None:
    """The name of a spec parses back to it, alone and as part of a scheme."""
    spec = QuantSpec(bits, group, symmetric, order)
    assert QuantSpec.parse(spec.name) == spec
    for tail in ("", "-h4", "-h8"):
        scheme = QuantScheme.parse(spec.name + tail)
        assert scheme.linear == spec
        assert QuantScheme.parse(scheme.name) == scheme
        assert scheme.name in (spec.name + tail, *MLC_SCHEMES)
        if isinstance(scheme.head, QuantSpec):
            assert (scheme.head.order, scheme.lm_head) == ("NK", scheme.head.in_order(order))


@pytest.mark.parametrize("name", ["w5g128", "w4g48", "q4", "w4g128-h3", "w4g128-x", "w4g128kna", "w4g128nk", ""])
def test_unknown_names_are_refused(name: str) -> None:
    """With the name or its wrong part in the message."""
    with pytest.raises(UsageError):
        QuantScheme.parse(name)
