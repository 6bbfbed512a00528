"""Packing is exact, the layout is the documented one, and names identify formats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_compile.errors import UsageError
from awq_compile.formats import (
    BITS,
    GROUPS,
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_names_identify_specs(bits: int, group: int, symmetric: bool) -> None:
    """The name of a spec parses back to it, alone and as part of a scheme."""
    spec = QuantSpec(bits, group, symmetric)
    assert QuantSpec.parse(spec.name) == spec
    for tail in ("", "-h4", "-h8"):
        scheme = QuantScheme.parse(spec.name + tail)
        assert scheme.linear == spec
        assert scheme.name == spec.name + tail


@pytest.mark.parametrize("name", ["w5g128", "w4g48", "q4", "w4g128-h3", "w4g128-x", ""])
def test_unknown_names_are_refused(name: str) -> None:
    """With the name or its wrong part in the message."""
    with pytest.raises(UsageError):
        QuantScheme.parse(name)
