"""Scoring of windows: the numbers against torch, the statistics against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_quant import make_model, write_text

from awq_compile.awq.calibrate import CalibrationSpec
from awq_compile.awq.quantize import quantize_model
from awq_compile.errors import CalibrationError
from awq_compile.evaluate import (
    dequantized_model,
    original_model,
    paired_difference,
    score,
    text_windows,
    torch_logits,
)
from awq_compile.formats import QuantizedMatrix, QuantScheme, dequantize_matrix


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory, model: Path) -> np.ndarray:
    return text_windows(write_text(tmp_path_factory.mktemp("text") / "t.txt", 333, 200), model, 30)


def test_windows_do_not_overlap_and_drop_the_tail(windows: np.ndarray, model: Path) -> None:
    """200 tokens are 6 windows of 30; too short a text is refused with both numbers."""
    assert windows.shape == (6, 30)
    with pytest.raises(CalibrationError, match="has 3 tokens, and one window needs 30"):
        text_windows("w1 w2 w3", model, 30)


def test_perplexity_and_divergence_are_those_of_torch(model: Path, windows: np.ndarray) -> None:
    """Against cross entropy and kl_div of torch in float64; the reference diverges from itself by nothing."""
    original = original_model(model)
    other = original_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    found = score({"a": torch_logits(original), "b": torch_logits(other)}, windows)
    for i, tokens in enumerate(windows):
        with torch.no_grad():
            a, b = (m(torch.from_numpy(tokens)[None]).logits[0, :-1].double() for m in (original, other))
        target = torch.from_numpy(tokens[1:])
        assert found["b"].nll[i] == pytest.approx(float(torch.nn.functional.cross_entropy(b, target)), abs=1e-5)
        divergence = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none")
        assert found["b"].kl[i] == pytest.approx(float(divergence.sum(-1).mean()), abs=1e-5)
    assert np.abs(found["a"].kl).max() == 0.0
    assert found["b"].perplexity == pytest.approx(math.exp(found["b"].nll.mean()))
    paired = paired_difference(found["b"], found["a"])
    differences = found["b"].nll - found["a"].nll
    assert paired.mean == pytest.approx(differences.mean())
    assert paired.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(6))


def test_the_reference_may_be_named(model: Path, windows: np.ndarray) -> None:
    """KL is measured from the named candidate, in whatever order they come."""
    uniform = np.zeros((30, 333), np.float32)
    found = score(
        {"uniform": lambda _tokens: uniform, "model": torch_logits(original_model(model))}, windows[:2], "model"
    )
    assert found["model"].mean_kl == 0.0 and found["uniform"].mean_kl > 0.1
    assert found["uniform"].perplexity == pytest.approx(333)


def test_the_dequantised_model_holds_exactly_the_codes_values(model: Path, tmp_path: Path) -> None:
    """Each weight of the transformers model is (q - z) * s of the checkpoint, and its norms the stored ones."""
    text = write_text(tmp_path / "t.txt", 333, 400)
    scheme = QuantScheme.parse("w4g32a")
    quantised = quantize_model(model, tmp_path / "q", scheme, CalibrationSpec(str(text), 8, 32))
    state = dequantized_model(quantised).state_dict()
    matrix = quantised.matrix("model.layers.0.mlp.down_proj.weight")
    assert isinstance(matrix, QuantizedMatrix)
    assert np.array_equal(state["model.layers.0.mlp.down_proj.weight"].numpy(), dequantize_matrix(matrix))
    norm = quantised.vector("model.layers.1.input_layernorm.weight")
    assert np.array_equal(state["model.layers.1.input_layernorm.weight"].numpy(), norm.astype(np.float32))
    assert all(value.dtype == torch.float32 for value in state.values())
