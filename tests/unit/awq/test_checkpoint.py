"""Opening a checkpoint: what it gives, and hostile ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_quant import edit_json, make_model, write_text
from safetensors.numpy import load_file, save_file

from awq_compile.awq.calibrate import CalibrationSpec
from awq_compile.awq.checkpoint import checkpoint_arrays, is_checkpoint, open_checkpoint
from awq_compile.awq.quantize import quantize_model
from awq_compile.errors import CheckpointError
from awq_compile.formats import QuantizedMatrix, QuantScheme, dequantize_matrix
from awq_compile.models.weights import Weights

UP = "model.layers.1.mlp.up_proj."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q")
    text = write_text(folder / "text.txt", 333, 600)
    scheme = QuantScheme.parse("w3g32a-h4")
    return quantize_model(source, folder / "out", scheme, CalibrationSpec(str(text), 8, 32), method="rtn").path


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "q"))


def change(path: Path, shard: str, name: str, value: Any) -> None:
    state = load_file(path / shard)
    if value is None:
        del state[name]
    else:
        state[name] = value(state[name])
    save_file(state, path / shard)


def test_matrices_and_vectors_are_what_was_written(source: Path, whole: Path) -> None:
    """Every array of the scheme is there; dequantised weights are near the originals; vectors are float16."""
    model = open_checkpoint(whole)
    weights = Weights(source, model.config)
    assert is_checkpoint(whole) and not is_checkpoint(source)
    assert (model.scheme.name, model.method) == ("w3g32a-h4", "rtn")
    for name, _, _ in checkpoint_arrays(model.config, model.scheme):
        if name.endswith("q_weight"):
            stem = name.removesuffix("q_weight") + "weight"
            matrix = model.matrix(stem)
            assert isinstance(matrix, QuantizedMatrix) and matrix.q_zero is not None
            original = weights.tensor(stem).numpy()
            error = np.linalg.norm(dequantize_matrix(matrix) - original) / np.linalg.norm(original)
            assert error < {3: 0.25, 4: 0.12}[matrix.spec.bits]
        elif name.endswith("norm.weight"):
            assert np.array_equal(model.vector(name), weights.float16(name))
    with pytest.raises(CheckpointError, match="is not a matrix"):
        model.matrix("model.norm.weight")


def test_opening_needs_no_torch(whole: Path) -> None:
    """Compiling reads checkpoints without importing torch or transformers."""
    code = (
        "import sys; from pathlib import Path; from awq_compile.awq.checkpoint import open_checkpoint\n"
        f"m = open_checkpoint(Path({str(whole)!r})); m.matrix('{UP}weight')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    """The message says what is missing."""
    with pytest.raises(CheckpointError, match=r"holds no awq_compile\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "format is 99, and this awq-compile reads 1"),
        ({"format": "1"}, "format is '1', expected int"),
        ({"scheme": "w5g32"}, "bits must be one of"),
        ({"scheme": "w4g32"}, r"expected U32|lies in None"),
        ({"scheme": None}, "'scheme' is missing"),
        ({"reports": [{}]}, "unexpected form"),
        ({"reports": [7]}, "unexpected form"),
        ({"reports": {}}, "expected list"),
    ],
)
def test_a_bad_record_is_refused(changes: dict[str, Any], says: str, damaged: Path) -> None:
    """Other versions, unknown schemes, malformed reports."""
    edit_json(damaged / "awq_compile.json", **changes)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(damaged)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", 3, "absent.safetensors", "model.bin"])
def test_an_index_that_points_elsewhere_is_refused(shard: object, damaged: Path) -> None:
    """Names with separators, of other kinds, of absent files."""
    index = damaged / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, UP + "q_scale": shard})
    with pytest.raises(CheckpointError):
        open_checkpoint(damaged)


@pytest.mark.parametrize(
    ("array", "value", "says"),
    [
        ("q_scale", None, "does not hold"),
        ("q_scale", lambda a: a[:-1], r"q_scale is F16 \[95, 2\], expected F16 \[96, 2\]"),
        ("q_scale", lambda a: a.astype(np.float32), "is F32"),
        ("q_weight", lambda a: a.astype(np.int32), "is I32"),
        ("q_zero", lambda a: a.T.copy(), r"\[2, 96\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_on_opening(array: str, value: Any, says: str, damaged: Path) -> None:
    """Missing arrays, other shapes and dtypes: from headers alone."""
    change(damaged, "layer-00001.safetensors", UP + array, value)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(damaged)


@pytest.mark.parametrize(
    ("array", "value", "says"),
    [
        ("q_scale", lambda a: np.full_like(a, np.nan), "q_scale holds NaN"),
        ("q_zero", lambda a: np.full_like(a, 8), "q_zero holds 8, at most 7"),
    ],
)
def test_values_that_cannot_be_are_refused_on_reading(array: str, value: Any, says: str, damaged: Path) -> None:
    """NaN scales and zero points beyond the codes."""
    change(damaged, "layer-00001.safetensors", UP + array, value)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(damaged).matrix(UP + "weight")
    assert caught.value.hint == f"remove {damaged}, and quantise the model again"


def test_truncated_and_missing_files_are_refused(damaged: Path) -> None:
    """A cut shard, a missing config, a record that is no JSON."""
    shard = damaged / "layer-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_checkpoint(damaged)
    (damaged / "awq_compile.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON") as caught:
        open_checkpoint(damaged)
    assert caught.value.hint == f"remove {damaged}, and quantise the model again"


@pytest.mark.parametrize(("value", "says"), [("NaN", r"reports\[0\]\.error is NaN"), ("1" + "0" * 400, "401 digits")])
def test_an_error_that_is_no_number_is_refused(value: str, says: str, damaged: Path) -> None:
    """As any number in the record: the report is made of it."""
    record = damaged / "awq_compile.json"
    record.write_text(re.sub(r'"error": [^,]+,', f'"error": {value},', record.read_text(), count=1))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(damaged)
