"""Scale search, range search and refinement: the objective is the real output error, and none makes it worse."""

from __future__ import annotations

import pytest
import torch

from awq_compile.awq.clip import block_error, diagonal_blocks, search_range
from awq_compile.awq.refine import _refit_scales, _sweep_codes, compensated, damped, inverse_cholesky, refine
from awq_compile.awq.rounding import decode, encode, plain_grid, round_to
from awq_compile.awq.search import candidates, quadratic, scaled_delta, search_scale, share
from awq_compile.formats import QuantSpec

SPECS = [QuantSpec(3, 32), QuantSpec(4, 64), QuantSpec(4, 32, symmetric=False), QuantSpec(3, 128, symmetric=False)]


def problem(k: int = 128, n: int = 48, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (T, K) with correlated channels of very different size, and weights (N, K)."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randn(k, generator=g).mul(1.2).exp()
    x = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g).mul(0.1) + torch.randn(
        tokens, k, generator=g
    )
    return x * size, torch.randn(n, k, generator=g) * 0.05


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_gram_loss_is_the_output_error(spec: QuantSpec) -> None:
    """tr(ΔW H ΔWᵀ) of a candidate equals the error of Q(W s) (x / s) replayed over all tokens, in float64."""
    x, weight = problem()
    scale = torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.5
    scaled = weight * scale
    rounded = round_to(scaled, plain_grid(scaled, spec), spec).double()
    replayed = ((x.double() / scale.double()) @ rounded.T - x.double() @ weight.double().T).square().sum()
    assert quadratic(scaled_delta(weight, scale, spec), x.T @ x) == pytest.approx(float(replayed), rel=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("seed", range(4))
def test_search_is_never_worse_than_rounding_to_nearest(spec: QuantSpec, seed: int) -> None:
    """The winner's loss is at most the identity's, and really is the loss of the scales returned."""
    x, weight = problem(seed=seed)
    gram = x.T @ x
    choice = search_scale(weight, gram, x.abs().mean(0), spec)
    assert choice.loss <= choice.rtn_loss
    assert choice.loss == pytest.approx(quadratic(scaled_delta(weight, choice.scale, spec), gram), rel=1e-5)
    assert choice.rtn_loss == pytest.approx(
        quadratic(round_to(weight, plain_grid(weight, spec), spec) - weight, gram), rel=1e-5
    )
    if choice.kind == "identity":
        assert torch.equal(choice.scale, torch.ones(128))


def test_search_finds_a_planted_salient_channel() -> None:
    """One input channel 30 times the others: its scale is above the rest, and the loss falls to under half."""
    x, weight = problem(seed=1)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    x[:, 17] *= 30
    choice = search_scale(weight, x.T @ x, x.abs().mean(0), QuantSpec(4, 128))
    assert int(choice.scale.argmax()) == 17
    assert choice.loss < 0.5 * choice.rtn_loss


def test_candidates_hold_both_ends_and_the_identity() -> None:
    """20 steps from r = 0 to r = 1, the identity first, every s positive and centred on 1."""
    x, weight = problem()
    found = list(candidates(x.abs().mean(0), weight, 32))
    assert found[0][0] == "identity" and torch.equal(found[0][2], torch.ones(128))
    assert {("mean", 1.0), ("duo", 0.0)} <= {(kind, r) for kind, r, _ in found}
    assert len(found) == 1 + 19 + 19
    for _, _, s in found:
        assert float(s.min()) > 0 and float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-4)


def test_large_matrices_are_ranked_on_some_rows_but_judged_on_all() -> None:
    """With more rows than are ranked, the loss returned is over every row."""
    x, weight = problem(k=128, n=3000)
    gram = x.T @ x
    import awq_compile.awq.search as search

    before, search._RANK_MACS = search._RANK_MACS, 128 * 128 * 200
    try:
        choice = search_scale(weight, gram, x.abs().mean(0), QuantSpec(3, 128))
    finally:
        search._RANK_MACS = before
    assert choice.loss == pytest.approx(
        quadratic(scaled_delta(weight, choice.scale, QuantSpec(3, 128)), gram), rel=1e-5
    )
    assert choice.loss <= choice.rtn_loss


def test_query_heads_of_one_kv_head_share_their_scales() -> None:
    """share() with 14 query and 2 KV heads of 3 channels: equal within a KV head, the mean of its 7 heads."""
    values = torch.arange(42.0)
    shared = share(values, (14, 2)).reshape(2, 7, 3)
    assert (shared == shared[:, :1]).all()
    assert torch.equal(shared[:, 0], values.reshape(2, 7, 3).mean(1))


def test_blocks_lie_on_the_diagonal() -> None:
    """block_error summed over groups is the full quadratic of the block-diagonal part of H."""
    x, weight = problem()
    gram = x.T @ x
    mask = torch.block_diag(*[torch.ones(32, 32)] * 4)
    total = float(block_error(weight, diagonal_blocks(gram, 32), 32).sum())
    assert total == pytest.approx(quadratic(weight, gram * mask), rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_range_search_improves_every_row_and_group(spec: QuantSpec) -> None:
    """By its own objective no group is worse than with its whole range, and some are better."""
    x, weight = problem()
    blocks = diagonal_blocks(x.T @ x, spec.group)
    plain_error = block_error(round_to(weight, plain_grid(weight, spec), spec) - weight, blocks, spec.group)
    found = search_range(weight, x.T @ x, spec)
    error = block_error(round_to(weight, found.grid, spec) - weight, blocks, spec.group)
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert float(error.sum()) < float(plain_error.sum())
    assert 0 < found.fraction <= 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_sweep_lowers_the_objective_and_keeps_the_residual_true(spec: QuantSpec) -> None:
    """Neither half of a sweep raises tr(ΔW H ΔWᵀ); the residual kept in place equals one computed afresh."""
    x, weight = problem(k=256, tokens=900)
    hessian = damped(x.T @ x)
    grid = search_range(weight, x.T @ x, spec).grid
    codes = compensated(weight, grid, inverse_cholesky(hessian), spec)
    zero, scale = grid.zero.T.contiguous(), grid.scale.T.contiguous()
    centred = codes.T - zero.repeat_interleave(spec.group, 0)
    residual = hessian @ (weight - decode(codes, grid, spec)).T

    def delta() -> torch.Tensor:
        return (weight.T - centred * scale.repeat_interleave(spec.group, 0)).T

    last = quadratic(delta(), hessian)
    for _ in range(3):
        _refit_scales(residual, centred, scale, hessian, spec.group)
        refit = quadratic(delta(), hessian)
        _sweep_codes(residual, centred, scale, zero, hessian, spec)
        swept = quadratic(delta(), hessian)
        assert refit <= last * (1 + 1e-4) and swept <= refit * (1 + 1e-4)
        last = swept
        fresh = hessian @ delta().T
        assert float((residual - fresh).abs().max()) < 1e-3 * float((hessian @ weight.T).abs().max())
    assert torch.equal(scale, scale.half().float())
    codes = centred + zero.repeat_interleave(spec.group, 0)
    assert float(codes.min()) >= 0 and float(codes.max()) < spec.levels


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_refinement_beats_plain_rounding_by_far_on_correlated_inputs(spec: QuantSpec) -> None:
    """On held-out activations of the same kind, not only on those that gave H."""
    x, weight = problem(k=256, tokens=4000)
    seen, unseen = x[:3000], x[3000:]
    gram = seen.T @ seen
    start = search_range(weight, gram, spec).grid
    found = refine(weight, start, gram, spec)
    refined = quadratic(decode(found.codes, found.grid, spec) - weight, unseen.T @ unseen)
    searched = quadratic(round_to(weight, start, spec) - weight, unseen.T @ unseen)
    assert refined < 0.85 * searched


def test_compensated_rounding_on_uncorrelated_inputs_is_plain_rounding() -> None:
    """With H diagonal nothing can be compensated: GPTQ's codes are the nearest ones."""
    _, weight = problem()
    spec = QuantSpec(4, 32)
    grid = plain_grid(weight, spec)
    hessian = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.1)
    codes = compensated(weight, grid, inverse_cholesky(hessian), spec)
    assert torch.equal(codes, encode(weight, grid, spec))
