"""Reading weights: values, and every refusal before anything is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_models import write_model
from helpers_quant import edit_json, make_model
from safetensors.torch import load_file, save_file

from awq_compile.errors import ModelError
from awq_compile.models.config import read_config
from awq_compile.models.weights import INDEX_FILE, SINGLE_FILE, Weights, expected_tensors, read_header

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_model(tmp_path / "sharded", "llama3", shards=True)


def open_weights(path: Path) -> Weights:
    return Weights(path, read_config(path))


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path / SINGLE_FILE)
    change(state)
    save_file(state, path / SINGLE_FILE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_are_those_of_the_file(dtype: str, tmp_path: Path) -> None:
    """Every dtype comes out as float32 with equal values; one file and shards agree; layer() names within the layer."""
    one, many = (
        make_model(tmp_path / str(shards), "qwen3-tied", shards=shards, dtype=dtype) for shards in (False, True)
    )
    state = load_file(one / SINGLE_FILE)
    for weights in (open_weights(one), open_weights(many)):
        for name, shape in expected_tensors(weights.config):
            value = weights.tensor(name)
            assert value.dtype == torch.float32 and tuple(value.shape) == shape
            assert torch.equal(value, state[name].float())
        assert torch.equal(
            weights.layer(1)["self_attn.q_norm.weight"], state["model.layers.1.self_attn.q_norm.weight"].float()
        )
        assert torch.equal(weights.head(), state["model.embed_tokens.weight"].float())


def test_symlinked_blobs_are_followed(model: Path, tmp_path: Path) -> None:
    """A hub cache keeps links to blobs: the names are checked, not what they point to."""
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    (model / SINGLE_FILE).rename(blob)
    (model / SINGLE_FILE).symlink_to(blob)
    assert open_weights(model).tensor(UP).shape == (96, 64)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """One shard of several is gone."""
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} does not exist: a part of the model is missing"):
        open_weights(sharded)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused_with_both_sizes(keep: int, model: Path) -> None:
    """Cut in the length, in the header and in the data."""
    path = model / SINGLE_FILE
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(
        ModelError, match=r"not a whole safetensors file: it has \d+ bytes, and its header|announces a header"
    ):
        open_weights(model)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "a\\b.safetensors", 7]
)
def test_an_index_that_points_elsewhere_is_refused(name: object, sharded: Path) -> None:
    """Only plain names of .safetensors files beside the index; the outside file is never opened."""
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    edit_json(sharded / INDEX_FILE, weight_map={**weight_map, UP: name})
    (sharded.parent / "x.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"weight_map\['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        open_weights(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    """The shard exists and does not hold the tensor."""
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[UP])
    edit_json(sharded / INDEX_FILE, weight_map={**weight_map, UP: other})
    with pytest.raises(ModelError, match=f"{UP} should be in {other}"):
        open_weights(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_weights_are_never_read(name: str, model: Path) -> None:
    """A directory with pickles only says why, and how to convert."""
    (model / SINGLE_FILE).unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=rf"only pickle weights \({name}\)") as caught:
        open_weights(model)
    assert "safetensors" in str(caught.value.hint)


def test_a_directory_without_weights(model: Path) -> None:
    """Neither weights nor pickles."""
    (model / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match="holds neither"):
        open_weights(model)


def test_contradictions_name_the_tensor_and_both_shapes(model: Path) -> None:
    """config.json says another intermediate size."""
    edit_json(model / "config.json", intermediate_size=128)
    with pytest.raises(
        ModelError, match=r"gate_proj\.weight has shape \[96, 64\], and config\.json asks for \[128, 64\]"
    ):
        open_weights(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing, config\.json asks for it with shape \[\d+"),
        ({"num_hidden_layers": 1}, r"hold model\.layers\.1\..* 1 layers\) has no place"),
        ({"attention_bias": True}, r"self_attn\.q_proj\.bias is missing"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, r"self_attn\.[qk]_norm\.weight is missing"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, object], says: str, model: Path) -> None:
    """More or fewer layers, biases, another family."""
    edit_json(model / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        open_weights(model)


def test_a_missing_head_hints_at_tying(model: Path) -> None:
    """lm_head absent from an untied model."""
    edit_state(model, lambda state: state.__delitem__("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing") as caught:
        open_weights(model)
    assert "tie_word_embeddings" in str(caught.value.hint)


def test_a_tied_head_that_is_written_too_must_agree(tmp_path: Path) -> None:
    """Present and equal: read. Present and different: refused."""
    path = make_model(tmp_path / "model", "qwen2-tied")
    edit_state(path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert open_weights(path).head().shape == (333, 64)
    edit_state(path, lambda state: state.update({"lm_head.weight": state["lm_head.weight"] + 1}))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_weights(path).head()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtypes_are_named(dtype: torch.dtype, model: Path) -> None:
    """float64, integers and float8."""
    edit_state(model, lambda state: state.update({UP: state[UP].to(dtype)}))
    with pytest.raises(ModelError, match=rf"{UP} has dtype [FI](64|8)\w*, supported are F32, F16, BF16"):
        open_weights(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_tensor(bad: float, model: Path) -> None:
    """Met when the tensor is read."""

    def plant(state: dict[str, torch.Tensor]) -> None:
        state[UP][0, :3] = bad

    edit_state(model, plant)
    weights = open_weights(model)
    with pytest.raises(ModelError, match=rf"{UP} holds 3 NaN or infinite values of 6144"):
        weights.tensor(UP)


def test_values_beyond_float16_are_refused_where_it_stores_them(tmp_path: Path) -> None:
    """A bfloat16 norm of 1e5 reads as float32, and is refused as float16; 65504 itself passes."""
    path = make_model(tmp_path / "model", "llama3", dtype="bfloat16")
    edit_state(path, lambda state: state["model.norm.weight"].__setitem__(2, 1e5))
    weights = open_weights(path)
    assert float(weights.tensor("model.norm.weight").max()) > 65504
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds 99840.* float16"):
        weights.float16("model.norm.weight")


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"[" * 5000],
)
def test_a_hostile_header_is_a_model_error(header: bytes, tmp_path: Path) -> None:
    """Whatever a header holds, reading it fails in words."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_header(path)


def test_a_quantised_checkpoint_is_not_a_model(model: Path) -> None:
    """Quantising a checkpoint of our own again is refused by name."""
    (model / "awq_compile.json").write_text("{}")
    with pytest.raises(ModelError, match="already quantised by awq-compile"):
        open_weights(model)


def test_the_fingerprint_follows_the_contents(model: Path) -> None:
    """One changed weight changes it; reading twice does not."""
    before = open_weights(model).fingerprint()
    assert before == open_weights(model).fingerprint()
    edit_state(model, lambda state: state[UP].__setitem__((0, 0), 0.5))
    assert open_weights(model).fingerprint() != before


def test_padding_of_the_vocabulary(tmp_path: Path) -> None:
    """The tokenizer says how many rows are tokens; without one all are, and it may lie elsewhere."""
    config = read_config(write_model(tmp_path / "padded", vocab_size=4352))
    assert (config.vocab_size, config.active_vocab_size) == (4352, 4096)
    assert read_config(write_model(tmp_path / "cut", vocab_size=4000)).active_vocab_size == 4000
    (tmp_path / "cut" / "tokenizer.json").unlink()
    (tmp_path / "padded" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert read_config(tmp_path / "padded").active_vocab_size == 4352
    assert read_config(tmp_path / "padded", tmp_path).active_vocab_size == 4096
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        read_config(tmp_path / "padded", tmp_path)
