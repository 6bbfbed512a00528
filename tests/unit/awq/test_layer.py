"""Folding and the self-check, on random layers of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_quant import FAMILIES, make_model, write_text

from awq_compile.awq import layer as layer_module
from awq_compile.awq.block import Block, hf_config
from awq_compile.awq.calibrate import CalibrationSpec
from awq_compile.awq.layer import LayerQuantizer, check_folding, exact_in_float16, fold, heads_of, kv_rows, spread
from awq_compile.awq.quantize import quantize_model
from awq_compile.awq.search import normalised, share
from awq_compile.errors import CompileError
from awq_compile.evaluate import dequantized_model, original_model, torch_logits
from awq_compile.formats import QuantScheme, QuantSpec
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.weights import Weights

SPEC = QuantSpec(4, 32)
Loaded = tuple[Path, ModelConfig, dict[str, torch.Tensor], Block]


@pytest.fixture(params=FAMILIES, scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = make_model(tmp_path_factory.mktemp("model"), request.param)
    config = read_config(path)
    tensors = Weights(path, config).layer(1)
    return path, config, tensors, Block(config, hf_config(config, path), tensors, 24)


def random_folds(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The layer with random scales folded into all four groups."""
    folded, generator = dict(tensors), torch.Generator().manual_seed(3)
    for group in config.architecture.scale_groups:
        k = tensors[f"{group.linears[0]}.weight"].shape[1]
        scale = torch.randn(k, generator=generator).mul(0.7).exp()
        folded |= fold(folded, group, normalised(share(scale.log(), heads_of(group, config)).exp()), config)
    return folded


def hidden_states(config: ModelConfig, windows: int = 3) -> torch.Tensor:
    return torch.randn(windows, 24, config.hidden_size, generator=torch.Generator().manual_seed(5))


def test_folding_keeps_the_layers_output(loaded: Loaded) -> None:
    """Arbitrary scales folded into norms, v (also 7:1 grouped-query, with biases) and up change nothing."""
    _, config, tensors, block = loaded
    x = hidden_states(config)
    folded = random_folds(tensors, config)
    for name in ("self_attn.o_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
        assert not torch.allclose(folded[name], tensors[name], rtol=0.01)
    expected = block(x)
    with block.replaced(folded):
        assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    check_folding(block, folded, x, "layer")


WRONG = {
    "norm not divided": ("input_layernorm.weight", 1.5),
    "v rows not divided": ("self_attn.v_proj.weight", 1.1),
    "one wrong channel of down": ("mlp.down_proj.weight", None),
    "up rows not divided": ("mlp.up_proj.weight", 0.9),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_fold_is_caught(loaded: Loaded, mistake: str) -> None:
    """Each planted mistake stops with an error that names the layer."""
    _, config, tensors, block = loaded
    folded = random_folds(tensors, config)
    name, factor = WRONG[mistake]
    if factor is None:
        folded[name] = folded[name].clone()
        folded[name][:, 3] *= 1.05
    else:
        folded[name] = folded[name] * factor
    with pytest.raises(CompileError, match=r"model\.layers\.1: after folding"):
        check_folding(block, folded, hidden_states(config), "model.layers.1")


def test_scales_that_query_heads_do_not_share_are_caught(loaded: Loaded) -> None:
    """Peers' mistake: a scale per channel of o under grouped-query attention, without sharing."""
    _, config, tensors, block = loaded
    group = config.architecture.scale_groups[1]
    scale = torch.rand(tensors["self_attn.o_proj.weight"].shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    folded = dict(tensors) | fold(tensors, group, scale, config)
    with pytest.raises(CompileError):
        check_folding(block, folded, hidden_states(config), "model.layers.1")


def test_the_planted_mistake_stops_quantising(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is on the way: with a broken fold the whole job fails, names the layer and leaves nothing."""
    path, config, _, _ = loaded
    monkeypatch.setattr(layer_module, "kv_rows", lambda scale, heads: kv_rows(scale, heads) * 1.01)
    text = write_text(tmp_path / "text.txt", config.vocab_size, 800)
    with pytest.raises(CompileError, match=r"model\.layers\.0: after folding"):
        quantize_model(path, tmp_path / "out", QuantScheme(SPEC), CalibrationSpec(str(text), 4, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_norm_scales_are_exact_in_float16() -> None:
    """norm / s is a float16, so that storing the folded norm loses nothing; dead channels keep s = 1."""
    norm = torch.tensor([1.0, -0.3, 1e-9, 0.0, 7.7, 60000.0])
    scale = torch.tensor([0.37, 1.7, 1e3, 5.0, 3e-3, 1e-4])
    found = exact_in_float16(norm, scale)
    folded = norm / found
    assert torch.equal(folded[[0, 1, 4]], folded[[0, 1, 4]].half().float())
    assert torch.allclose(found[[0, 1, 4]], scale[[0, 1, 4]], rtol=1e-3)
    assert torch.equal(found[[2, 3, 5]], torch.ones(3))  # 60000 / 1e-4 would overflow


def test_propagated_states_are_those_of_the_stored_layer(loaded: Loaded) -> None:
    """What the next layer is calibrated on is what the stored codes, norms and biases compute."""
    _, config, tensors, _ = loaded
    path = loaded[0]
    block = Block(config, hf_config(config, path), dict(tensors), 24)
    x = hidden_states(config, 6)
    with torch.inference_mode():
        layer, out = LayerQuantizer(block, tensors, config, QuantSpec(3, 32), "model.layers.1").run(x)
        stored = {name: value.half().float() for name, value in layer.vectors.items()}
        for name, found in layer.linears.items():
            group = found.codes.reshape(*found.grid.scale.shape, 32)
            stored[name] = ((group - found.grid.zero[..., None]) * found.grid.scale[..., None]).flatten(1)
        again = Block(config, hf_config(config, path), stored, 24)
        assert torch.allclose(again(x), out, rtol=1e-3, atol=1e-3 * float(out.abs().max()))
    assert [report.name.split(".", 3)[3] for report in layer.reports] == [
        f"{name}.weight" for name in config.architecture.linears
    ]
    for report in layer.reports:
        assert report.error is not None and report.rtn_error is not None
        assert report.error < report.rtn_error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_model_is_the_original_at_eight_bits(family: str, tmp_path: Path) -> None:
    """Everything folded and stored, read back into transformers: at 8 bits no further from the original than RTN."""
    path = make_model(tmp_path / "model", family, initializer_range=0.05)
    config = read_config(path)
    text = write_text(tmp_path / "text.txt", config.vocab_size, 3000)
    calibration = CalibrationSpec(str(text), 32, 64)
    scheme = QuantScheme.parse("w8g32-h8")
    awq = quantize_model(path, tmp_path / "awq", scheme, calibration)
    rtn = quantize_model(path, tmp_path / "rtn", scheme, calibration, method="rtn")
    assert any(report.kind != "identity" for report in awq.reports)
    tokens = np.arange(2, 62)
    original = torch_logits(original_model(path))(tokens)
    errors = [float(np.linalg.norm(torch_logits(dequantized_model(q))(tokens) - original)) for q in (awq, rtn)]
    assert errors[0] < 1.2 * errors[1]
    assert errors[1] < 0.1 * np.linalg.norm(original)


def test_round_to_nearest_is_kept_where_awq_loses(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a search that returns harmful scales and no refinement, q/k/v and gate/up fall back, and say so."""
    path, config, tensors, _ = loaded
    block = Block(config, hf_config(config, path), dict(tensors), 24)
    search = layer_module.search_scale

    def harmful(weight, gram, mean_abs, spec, heads):  # type: ignore[no-untyped-def]
        choice = search(weight, gram, mean_abs, spec, heads)
        if heads is not None:
            return choice
        bad = torch.where(torch.arange(len(mean_abs)) % 7 == 0, 40.0, 0.02)
        return replace(choice, kind="mean", ratio=1.0, scale=bad)

    monkeypatch.setattr(layer_module, "search_scale", harmful)
    monkeypatch.setattr(layer_module, "refine", lambda weight, grid, gram, spec: layer_module.plain(weight, grid, spec))
    with torch.inference_mode():
        layer, _ = LayerQuantizer(block, tensors, config, SPEC, "model.layers.1").run(hidden_states(config))
    for report in layer.reports:
        if report.name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight", "up_proj.weight")):
            assert (report.kept, report.kind, report.refined) == ("rtn", "identity", False)
            assert report.note == "round-to-nearest was not beaten"
            assert report.error == pytest.approx(report.rtn_error, rel=0.05)


def test_windows_are_spread_evenly() -> None:
    """Few windows: all of them. Many: the asked number, from first to last part."""
    assert spread(3, 16) == [0, 1, 2]
    assert spread(64, 4) == [0, 16, 32, 48]
