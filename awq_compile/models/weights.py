"""`Weights`: a Hugging Face checkpoint read safely, one tensor at a time.

Everything that headers, names and shapes can tell is checked when a `Weights` is made, before any output
exists; values are checked when a tensor is read. Files are opened for one tensor and closed again, so the
memory held never grows with the model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import ModelError
from awq_compile.json_input import parse_json
from awq_compile.models.config import JsonFile, ModelConfig

if TYPE_CHECKING:
    import torch

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES: Final = 64 << 20
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 16, 1 << 20  # what `fingerprint` reads of a file
_FLOAT16_MAX: Final = 65504.0


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, from a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within a decoder layer → shape, for example `self_attn.q_proj.weight` → (N, K)."""
    c = config
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (c.hidden_size,),
        "post_attention_layernorm.weight": (c.hidden_size,),
    }
    for name in c.architecture.linears:
        n, k = c.linear_shape(name)
        found[f"{name}.weight"] = (n, k)
        if c.o_bias if name.endswith("o_proj") else c.qkv_bias and name.startswith("self_attn."):
            found[f"{name}.bias"] = (n,)
    if c.qk_norm:
        found |= {f"self_attn.{norm}.weight": (c.head_dim,) for norm in ("q_norm", "k_norm")}
    return found


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that a checkpoint of this configuration must hold."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for i in range(config.num_layers):
        for name, shape in layer_tensors(config).items():
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def read_header(path: Path, error: type[ModelError] | type[Exception] = ModelError) -> dict[str, dict[str, Any]]:
    """The JSON header of a safetensors file, with its offsets checked against the file's size."""

    def damaged(why: str) -> Exception:
        return error(f"{path} is not a whole safetensors file: {why}; download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise damaged(f"it has {size} bytes and announces a header of {length}")
            header = parse_json(stream.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist: a part of the model is missing; download it again") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise damaged(f"its header cannot be read ({problem})") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        try:
            begin, stop = entry["data_offsets"]
            shape, dtype = entry["shape"], entry["dtype"]
            numbers = [begin, stop, *shape]
            if not all(type(n) is int and n >= 0 for n in numbers) or stop < begin or type(dtype) is not str:
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise damaged(f"the entry of {name!r} is {entry!r:.120}") from None
        end = max(end, stop)
    if 8 + length + end != size:
        raise damaged(f"it has {size} bytes, and its header describes {8 + length + end}")
    return header


class Weights:
    """The floating-point weights of a model directory.

    Raises `ModelError` for a missing or truncated file, an index that points elsewhere, pickle-only
    weights, missing, unexpected or mis-shaped tensors and unsupported dtypes.
    """

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        self.model_dir = model_dir
        self.config = config
        self._tensors = self._locate()
        self._check()

    def _locate(self) -> dict[str, TensorInfo]:
        if (self.model_dir / "awq_compile.json").exists():
            raise ModelError(f"{self.model_dir} was already quantised by awq-compile", hint="give the original model")
        single, index = self.model_dir / SINGLE_FILE, self.model_dir / INDEX_FILE
        if single.exists():
            return {name: self._info(single, entry) for name, entry in read_header(single).items()}
        if not index.exists():
            self._refuse_missing()
        file = JsonFile(index)
        weight_map = file.get("weight_map", dict)
        for name, shard in weight_map.items():
            inside = isinstance(shard, str) and shard.endswith(".safetensors") and not set("/\\\0") & set(shard)
            if not inside or shard.startswith(".."):
                raise ModelError(
                    f"{index}: weight_map[{name!r}] is {shard!r}, expected the name of a .safetensors file beside it"
                )
        headers = {shard: read_header(self.model_dir / shard) for shard in sorted(set(weight_map.values()))}
        found = {}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ModelError(f"{index}: {name} should be in {shard}, which does not hold it")
            found[name] = self._info(self.model_dir / shard, headers[shard][name])
        return found

    @staticmethod
    def _info(path: Path, entry: dict[str, Any]) -> TensorInfo:
        return TensorInfo(path, entry["dtype"], tuple(entry["shape"]))

    def _refuse_missing(self) -> None:
        pickles = sorted(p.name for p in self.model_dir.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise ModelError(
                f"{self.model_dir} holds only pickle weights ({pickles[0]}), which can run code when read",
                hint="convert them to safetensors with transformers: model.save_pretrained(…)",
            )
        raise ModelError(
            f"{self.model_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            hint="download the model's *.safetensors files",
        )

    def _check(self) -> None:
        expected = dict(expected_tensors(self.config))
        for name, shape in expected.items():
            info = self._tensors.get(name)
            if info is None:
                tied = "set tie_word_embeddings to true in config.json if the model ties its head to the embedding"
                raise ModelError(
                    f"{self.model_dir}: tensor {name} is missing, config.json asks for it with shape {list(shape)}",
                    hint=tied if name == "lm_head.weight" else "download the model again, or check config.json",
                )
            self._check_one(name, info, shape)
        head = self._tensors.get("lm_head.weight")
        if head is not None:  # some exporters write the tied head too
            self._check_one("lm_head.weight", head, expected["model.embed_tokens.weight"])
        for name in self._tensors.keys() - expected.keys() - {"lm_head.weight"}:
            if not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(
                    f"{self.model_dir}: the weights hold {name} with shape {list(self._tensors[name].shape)}, "
                    f"for which config.json ({self.config.architecture.hf_name}, {self.config.num_layers} layers) "
                    "has no place",
                    hint="check that config.json belongs to these weights",
                )

    def _check_one(self, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if info.shape != shape:
            raise ModelError(
                f"{info.file}: {name} has shape {list(info.shape)}, and config.json asks for {list(shape)}",
                hint="check that config.json belongs to these weights",
            )
        if info.dtype not in _DTYPE_BYTES:
            raise ModelError(f"{info.file}: {name} has dtype {info.dtype}, supported are {', '.join(_DTYPE_BYTES)}")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as float32; refuses NaN and Inf."""
        import torch
        from safetensors import SafetensorError, safe_open

        info = self._tensors[name]
        try:
            with safe_open(info.file, framework="pt") as file:
                value: torch.Tensor = file.get_tensor(name).to(torch.float32, copy=True)
        except (OSError, SafetensorError) as problem:
            raise ModelError(f"{info.file}: {name} cannot be read: {problem}; download the file again") from None
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ModelError(f"{info.file}: {name} holds {bad} NaN or infinite values of {value.numel()}")
        return value

    def float16(self, name: str) -> npt.NDArray[np.float16]:
        """The tensor as it is stored in float16; refuses values that overflow."""
        return to_float16(self.tensor(name), f"{self._tensors[name].file}: {name}")

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Every tensor of one decoder layer, by its name within the layer."""
        return {name: self.tensor(f"model.layers.{index}.{name}") for name in layer_tensors(self.config)}

    def head(self) -> torch.Tensor:
        """The LM head (V, H): its own matrix, or the embedding when tied."""
        if not self.config.tie_word_embeddings:
            return self.tensor("lm_head.weight")
        import torch

        embedding = self.tensor("model.embed_tokens.weight")
        if "lm_head.weight" in self._tensors and not torch.equal(embedding, self.tensor("lm_head.weight")):
            raise ModelError(
                f"{self.model_dir}: lm_head.weight differs from model.embed_tokens.weight, and config.json ties them",
                hint="set tie_word_embeddings to false in config.json",
            )
        return embedding

    def fingerprint(self) -> dict[str, str]:
        """File name → sha256 over its size and up to 16 blocks of 1 MiB, evenly spread, first and last among them.

        Covers files of up to 16 MiB whole; the cost for larger ones is bounded.
        """
        found = {}
        for path in sorted({info.file for info in self._tensors.values()}):
            size = path.stat().st_size
            last = max(0, size - _SAMPLE_BYTES)
            starts = sorted({i * last // (_SAMPLE_BLOCKS - 1) for i in range(_SAMPLE_BLOCKS)})
            digest = hashlib.sha256(str(size).encode())
            with path.open("rb") as stream:
                for start in starts:
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
            found[path.name] = digest.hexdigest()
        return found


def to_float16(value: torch.Tensor, what: str) -> npt.NDArray[np.float16]:
    """Finite float32 → float16; refuses values that overflow, naming `what`."""
    worst = float(value.abs().max()) if value.numel() else 0.0
    if worst >= _FLOAT16_MAX + 16:  # half a step above the largest float16 rounds to infinity
        raise ModelError(f"{what} holds {worst:g}, and float16, in which it is stored, ends at {_FLOAT16_MAX:g}")
    return np.asarray(value.numpy().astype(np.float16))
