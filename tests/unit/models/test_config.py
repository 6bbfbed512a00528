"""Numbers of config.json that no model can have are refused when it is read, by key, value and range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq_compile.errors import ModelError
from awq_compile.models.config import Llama3Rope, read_config

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 4096,
}
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, **changes: Any) -> Path:
    """A config.json with changed keys."""
    (folder / "config.json").write_text(json.dumps(GOOD | changes))
    return folder


def test_rope_of_either_version_of_transformers(tmp_path: Path) -> None:
    """`rope_theta` beside the scaling or within; an integer is a number."""
    scaled = Llama3Rope(8.0, 1.0, 4.0, 8192)
    old = read_config(write(tmp_path, rope_theta=500000, rope_scaling=ROPE))
    new = read_config(write(tmp_path, rope_parameters=ROPE | {"rope_theta": 500000.0}))
    assert (old.rope_theta, old.rope_scaling) == (new.rope_theta, new.rope_scaling) == (500000.0, scaled)
    assert read_config(write(tmp_path, rope_scaling={"rope_type": "default"})).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is Infinity"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is an integer of 401 digits"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected 1e-12 to 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected 1e-12 to 1"),
        ({"rope_theta": 1e300}, r"rope_theta is 1e\+300, expected 1e-12 to 1e\+15"),
        ({"rope_scaling": ROPE | {"factor": float("nan")}}, r"rope_scaling\.factor is NaN"),
        ({"rope_scaling": ROPE | {"factor": 1e308}}, r"factor is 1e\+308, expected 1e-12 to 1e\+06"),
        ({"rope_scaling": ROPE | {"high_freq_factor": float("inf")}}, r"rope_scaling\.high_freq_factor is Infinity"),
        ({"rope_scaling": ROPE | {"low_freq_factor": 4}}, "high_freq_factor is 4 and low_freq_factor 4"),
        (
            {"rope_scaling": ROPE | {"original_max_position_embeddings": 10**40}},
            r"original_max_position_embeddings is 1(0+), expected 1 to 16777216",
        ),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1, expected 2 to 16777216"),
        ({"sliding_window": 1}, "sliding_window is 1, expected 2 to"),
        ({"sliding_window": -1}, "sliding_window is -1, expected 2 to"),
        ({"bos_token_id": 10**40}, "bos_token_id is 10+, expected a token id"),
        ({"hidden_size": [1] * 1000}, r"hidden_size is \[1, .{0,80}, expected int$"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The file, the key, the value, and what is allowed."""
    with pytest.raises(ModelError, match=message) as caught:
        read_config(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
