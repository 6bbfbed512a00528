"""`ModelConfig`: config.json read with types, checked, and resolved to what the decoder needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from awq_compile.errors import ModelError
from awq_compile.json_input import read_object
from awq_compile.models.architectures import Architecture, find_architecture

T = TypeVar("T")
_REQUIRED: Final = object()
_MAX_CONFIG_BYTES: Final = 4 << 20
_LEAST: Final = 1e-12
_CORRECT: Final = "give the value that the model was trained with"


class JsonFile:
    """A JSON object from outside. Every read names the key, the value and the file when it does not fit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        hint = "give a Hugging Face directory: config.json, *.safetensors, tokenizer.json"
        self.data = read_object(path, ModelError, _MAX_CONFIG_BYTES, hint=hint)

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED, *, within: dict[str, Any] | None = None) -> T:
        """Value of `key` as `kind` (an int is taken for a float); null counts as absent."""
        value = (self.data if within is None else within).get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"{self.path}: key {key!r} is missing")
            return default  # type: ignore[no-any-return]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.path}: {key} is {value!r:.80}, expected {kind.__name__}")
        return value

    def positive(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        least: int = 1,
        most: int = 1 << 24,
        within: dict[str, Any] | None = None,
    ) -> int:
        """Value of `key` as an integer in least..most."""
        value = self.get(key, int, default, within=within)
        if not least <= value <= most:
            raise ModelError(f"{self.path}: {key} is {value!s:.40}, expected {least} to {most}", hint=_CORRECT)
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, most: float, within: dict[str, Any] | None = None) -> float:
        """Value of `key` as a positive number that arithmetic in float32 takes, up to `most`."""
        value = self.get(key, float, default, within=within)
        if not _LEAST <= value <= most:
            raise ModelError(f"{self.path}: {key} is {value:g}, expected {_LEAST:g} to {most:g}", hint=_CORRECT)
        return value


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later ("rope_type": "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model, resolved. Sizes are in elements.

    H = hidden_size, F = intermediate_size, L = num_layers, V = vocab_size, D = head_dim; D need not be
    H / num_heads. The projections are q (num_heads*D, H), k and v (num_kv_heads*D, H), o (H, num_heads*D),
    gate and up (F, H), down (H, F). Of the V rows the first `active_vocab_size` are tokens, the others padding.
    """

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    active_vocab_size: int
    context_window_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def model_type(self) -> str:
        """`llama`, `mistral`, `qwen2` or `qwen3`."""
        return self.architecture.model_type

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a layer's linear, for example `self_attn.q_proj`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        shapes |= {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
        return shapes[name.rpartition(".")[2]]


def _rope(file: JsonFile) -> tuple[float, Llama3Rope | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    scaling: dict[str, Any] = file.get("rope_parameters", dict, None) or file.get("rope_scaling", dict, None) or {}
    theta = file.number("rope_theta", 10000.0, most=1e15, within=scaling if scaling.get("rope_theta") else None)
    kind = file.get("rope_type", str, None, within=scaling) or file.get("type", str, "default", within=scaling)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(
            f"{file.path}: rope type {kind!r} is not supported, only 'default' and 'llama3'",
            hint="remove the rope scaling from config.json to use the model's original context length",
        )
    factor, low, high = (
        file.number(key, most=1e6, within=scaling) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if high <= low:
        raise ModelError(
            f"{file.path}: high_freq_factor is {high:g} and low_freq_factor {low:g}, expected the first to be larger",
            hint=_CORRECT,
        )
    return theta, Llama3Rope(factor, low, high, file.positive("original_max_position_embeddings", within=scaling))


def token_ids(file: JsonFile, key: str) -> tuple[int, ...]:
    """A token id or a list of them."""
    value = file.data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise ModelError(f"{file.path}: {key} is {value!r:.80}, expected a token id or a list of them")
    return tuple(ids)


def _context(file: JsonFile) -> int:
    """Longest sequence: within a sliding window full and windowed attention agree, so it caps the context."""
    context = file.positive("max_position_embeddings", 2048, least=2)
    if not file.get("use_sliding_window", bool, True):
        return context
    return min(context, file.positive("sliding_window", context, least=2))


def load_tokenizer(folder: Path) -> Any:
    """tokenizer.json of a model directory, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_config(model_dir: Path, tokenizer_dir: Path | None = None) -> ModelConfig:
    """Reads and checks `config.json` (and `generation_config.json` for stop tokens) of a model directory.

    `tokenizer_dir`, by default the same, has tokenizer.json; without one every row of the vocabulary is a token.

    Raises `ModelError` for anything missing, mistyped, contradictory or unsupported.
    """
    file = JsonFile(model_dir / "config.json")
    if "auto_map" in file.data:
        raise ModelError(
            f"{file.path}: the model needs remote code (auto_map: {file.data['auto_map']}), which is never run",
            hint="use a model of a family that transformers implements itself",
        )
    if "quantization_config" in file.data:
        raise ModelError(
            f"{file.path}: the weights are already quantised ({file.data['quantization_config']!r:.80})",
            hint="give the original floating-point model",
        )
    names = file.get("architectures", list, [])
    arch = find_architecture([str(name) for name in names], str(file.path))
    if (act := file.get("hidden_act", str, "silu")) != "silu":
        raise ModelError(f"{file.path}: hidden_act is {act!r}, and {arch.hf_name} is supported with 'silu' only")
    if file.get("mlp_bias", bool, False):
        raise ModelError(f"{file.path}: mlp_bias is true, which is not supported")
    hidden, heads = file.positive("hidden_size"), file.positive("num_attention_heads", most=4096)
    kv_heads = file.positive("num_key_value_heads", heads, most=4096)
    if heads % kv_heads:
        raise ModelError(
            f"{file.path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = file.positive("head_dim", hidden // heads, most=4096)
    if head_dim % 2:
        raise ModelError(f"{file.path}: head_dim {head_dim} is odd, and rotary embedding needs an even one")
    theta, scaling = _rope(file)
    generation = model_dir / "generation_config.json"
    eos = token_ids(JsonFile(generation), "eos_token_id") if generation.is_file() else ()
    bos = token_ids(file, "bos_token_id")
    vocab = file.positive("vocab_size")
    tokens = tokenizer_dir or model_dir
    active = load_tokenizer(tokens).get_vocab_size() if (tokens / "tokenizer.json").is_file() else vocab
    if active < 1:
        raise ModelError(f"{tokens / 'tokenizer.json'} has no tokens")

    def flag(value: bool | str) -> bool:
        return file.get(value, bool, False) if isinstance(value, str) else value

    return ModelConfig(
        architecture=arch,
        hidden_size=hidden,
        intermediate_size=file.positive("intermediate_size"),
        num_layers=file.positive("num_hidden_layers", most=4096),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        active_vocab_size=min(active, vocab),
        context_window_size=_context(file),
        rms_norm_eps=file.number("rms_norm_eps", 1e-6, most=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=flag(arch.qkv_bias),
        o_bias=flag(arch.o_bias),
        qk_norm=arch.qk_norm,
        tie_word_embeddings=file.get("tie_word_embeddings", bool, False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos or token_ids(file, "eos_token_id"),
    )
