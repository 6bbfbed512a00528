"""Plain rounding against brute force, and its guards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_compile.awq.rounding import LARGEST_SCALE, SMALLEST_SCALE, decode, encode, pack, plain_grid, round_to
from awq_compile.errors import ModelError
from awq_compile.formats import BITS, GROUPS, QuantSpec, dequantize_matrix

SPECS = [QuantSpec(bits, group, symmetric) for bits in BITS for group in GROUPS for symmetric in (True, False)]


def random_weight(spec: QuantSpec, seed: int = 0, rows: int = 5, groups: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, groups * spec.group, generator=generator) * 0.05


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_codes_are_the_nearest_of_all_grid_values(spec: QuantSpec) -> None:
    """No other code of the same grid is nearer: checked against all 2^b values."""
    weight = random_weight(spec)
    grid = plain_grid(weight, spec)
    values = torch.arange(spec.levels)[:, None, None, None] - grid.zero[None, :, :, None]
    values = values * grid.scale[None, :, :, None]  # (2^b, N, K/G, 1)
    best = (values - weight.reshape(1, 5, 3, spec.group)).abs().amin(0).flatten(-2)
    assert torch.allclose((round_to(weight, grid, spec) - weight).abs(), best, atol=1e-7)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.symmetric], ids=lambda spec: spec.name)
def test_the_largest_element_takes_the_last_code(spec: QuantSpec) -> None:
    """Signed scale: whatever the sign of the largest element, it sits at code 2^b - 1, 2^(b-1) steps from zero."""
    weight = random_weight(spec, seed=3)
    grid = plain_grid(weight, spec)
    codes = encode(weight, grid, spec).reshape(5, 3, spec.group)
    largest = weight.reshape(5, 3, spec.group).abs().argmax(-1, keepdim=True)
    assert (codes.gather(-1, largest) == spec.levels - 1).all()
    assert (grid.scale < 0).any() and (grid.scale > 0).any()
    assert int(codes.min()) == 0 or spec.bits == 8


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_packing_keeps_every_value(spec: QuantSpec) -> None:
    """Packed and unpacked, in NumPy, gives exactly the values that torch rounded to; scales are float16."""
    weight = random_weight(spec, seed=5)
    grid = plain_grid(weight, spec)
    codes = encode(weight, grid, spec)
    matrix = pack(codes, grid, spec, "w")
    assert np.array_equal(dequantize_matrix(matrix), decode(codes, grid, spec).numpy())
    assert torch.equal(grid.scale, grid.scale.half().float())


@settings(max_examples=60, deadline=None)
@given(
    size=st.floats(1e-12, 6e4),
    kind=st.sampled_from(["zeros", "one", "constant", "random"]),
    spec=st.sampled_from(SPECS),
)
def test_scales_are_never_zero_denormal_or_infinite(size: float, kind: str, spec: QuantSpec) -> None:
    """Any weight that float16 holds gives a normal float16 scale and an error of about half a step at most."""
    weight = torch.zeros(1, spec.group)
    if kind == "one":
        weight[0, 3] = -size
    elif kind == "constant":
        weight += size
    elif kind == "random":
        weight = random_weight(spec, rows=1, groups=1).clamp(-1, 1) * size
    grid = plain_grid(weight, spec)
    assert (grid.scale.abs() >= SMALLEST_SCALE).all() and (grid.scale.abs() <= LARGEST_SCALE).all()
    assert (grid.zero >= 0).all() and (grid.zero < spec.levels).all()
    error = (round_to(weight, grid, spec) - weight).abs().max()
    # a step at the far end of a symmetric range, plus what rounding the scale to float16 moves the ends by
    assert error <= grid.scale.abs().max() * (1 + spec.levels * 2**-11)


def test_a_scale_beyond_float16_is_refused() -> None:
    """A weight too large for its scale is an error that names the tensor, never a silent Inf."""
    spec = QuantSpec(3, 32)
    weight = torch.full((1, 32), 1e6)
    grid = plain_grid(weight, spec)
    with pytest.raises(ModelError, match=r"model\.x: .* float16 cannot hold"):
        pack(encode(weight, grid, spec), grid, spec, "model.x")
