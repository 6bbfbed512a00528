"""The quantised checkpoint: a directory of safetensors files and `awq_compile.json`.

    awq_compile.json               format version, scheme, method, calibration, options, versions, source, reports
    model.safetensors.index.json   tensor name → file
    layer-00000.safetensors …      model.layers.0.self_attn.q_proj.q_weight | q_scale | q_zero, norms and biases float16
    embedding.safetensors          embedding
    head.safetensors               final norm, LM head
    config.json, tokenizer.json …  copied from the model

Opening one treats it as hostile: names, shapes and dtypes are checked against the configuration and scheme
from headers alone, values when an array is read. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import AwqCompileError, CheckpointError, ModelError
from awq_compile.formats import F16, Float16Spec, QuantizedMatrix, QuantScheme, WeightSpec
from awq_compile.models.config import JsonFile, ModelConfig, read_config
from awq_compile.models.weights import expected_tensors, read_header

FORMAT_VERSION: Final = 1
META_FILE: Final = "awq_compile.json"
INDEX_FILE: Final = "model.safetensors.index.json"
_DTYPES: Final = {"uint32": "U32", "float16": "F16", "uint8": "U8"}
COPIED_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MAX_COPIED_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class LinearReport:
    """What quantising did to one linear.

    `rtn_error` and `error` are relative output errors, sqrt(tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)), of round-to-nearest
    (the same format, plain range) and of what was kept, over evenly spaced rows where the matrix is large.
    `kind` is "mean" (s = a^r), "duo" (s = a^r / w^(1-r)) or "identity"; `ratio` is r. `kept` is "rtn", "awq" or
    "awq+refined" for a layer's linear, "rtn", "range search" or "range search+refined" for embedding and head.
    """

    name: str
    shape: tuple[int, int]
    spec: str
    rtn_error: float | None = None
    error: float | None = None
    kind: str = "identity"
    ratio: float = 0.0
    clipped: float = 0.0
    refined: bool = False
    kept: str = "rtn"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> LinearReport:
        """Raises `CheckpointError` for anything of another shape."""
        kinds: dict[str, tuple[type, ...]] = dict.fromkeys(("name", "spec", "kind", "kept", "note"), (str,))
        kinds |= dict.fromkeys(("ratio", "clipped"), (float, int)) | {"refined": (bool,), "shape": (list,)}
        kinds |= {name: (float, int, type(None)) for name in ("rtn_error", "error")}
        if (
            not isinstance(data, dict)
            or data.keys() != kinds.keys()
            or not all(isinstance(data[name], kind) for name, kind in kinds.items())
            or [type(size) for size in data["shape"]] != [int, int]
        ):
            raise CheckpointError(f"a layer report has an unexpected form: {data!r:.120}")
        return LinearReport(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class QuantizedModel:
    """An opened checkpoint. Arrays are read when asked for, one at a time.

    What is stored is NK; with a `scheme` in KN, matrices are given in that order, see `in_order`.
    """

    path: Path
    config: ModelConfig
    scheme: QuantScheme
    method: str
    reports: tuple[LinearReport, ...]
    meta: dict[str, Any] = field(repr=False, compare=False)
    _files: dict[str, Path] = field(repr=False, compare=False)

    def in_order(self, order: str) -> QuantizedModel:
        """The same codes, with the layers' linears in another order."""
        return replace(self, scheme=self.scheme.in_order(order))

    def spec(self, name: str) -> WeightSpec:
        """Format of the matrix that Hugging Face calls `name`, for example `model.embed_tokens.weight`."""
        return _spec(self.scheme, name)

    def matrix(self, name: str) -> QuantizedMatrix | F16:
        """The matrix that Hugging Face calls `name` (`….weight`), packed or float16."""
        shapes = dict(expected_tensors(self.config))
        if len(shapes.get(name, ())) != 2:
            raise CheckpointError(f"{self.path}: {name} is not a matrix of this model")
        spec = self.spec(name)
        if isinstance(spec, Float16Spec):
            return self._finite(name)
        stem = name.removesuffix("weight")
        scale = self._finite(stem + "q_scale")
        zero = None if spec.symmetric else np.asarray(self._read(stem + "q_zero"), np.uint8)
        if zero is not None and int(zero.max(initial=0)) >= spec.levels:
            raise CheckpointError(
                f"{self.path}: {stem}q_zero holds {int(zero.max())}, at most {spec.levels - 1} is allowed",
                hint=_again(self.path),
            )
        packed = np.asarray(self._read(stem + "q_weight"), np.uint32)
        return QuantizedMatrix(spec.in_order("NK"), packed, scale, zero).in_order(spec.order)

    def vector(self, name: str) -> F16:
        """A norm weight or bias, float16."""
        return self._finite(name)

    def _finite(self, name: str) -> F16:
        value = np.asarray(self._read(name), np.float16)
        if not np.isfinite(value).all():
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinite values", hint=_again(self.path))
        return value

    def _read(self, name: str) -> npt.NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            raise CheckpointError(f"{self.path} holds no array {name}")
        try:
            with safe_open(self._files[name], framework="numpy") as file:
                return np.array(file.get_tensor(name))
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(
                f"{self._files[name]}: {name} cannot be read: {problem}", hint=_again(self.path)
            ) from None


def _spec(scheme: QuantScheme, name: str) -> WeightSpec:
    outer = {"model.embed_tokens.weight": scheme.head, "lm_head.weight": scheme.lm_head}
    return outer.get(name, scheme.linear)


def checkpoint_arrays(config: ModelConfig, scheme: QuantScheme) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every array that a checkpoint holds."""
    for name, shape in expected_tensors(config):
        if len(shape) == 1:
            yield name, shape, "float16"
            continue
        for suffix, (found, dtype) in _spec(scheme, name).arrays(shape[0], shape[1]).items():
            yield name.removesuffix("weight") + suffix, found, dtype


def _again(path: Path) -> str:
    """The hint of damage, for a checkpoint of the user's and for one in the cache."""
    return f"remove {path}, and quantise the model again"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory that awq-compile's quantiser wrote."""
    return (path / META_FILE).is_file()


def open_checkpoint(path: Path) -> QuantizedModel:
    """Opens and checks a checkpoint; raises `CheckpointError` for a damaged one or one of another version."""
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is not a quantised checkpoint: it holds no {META_FILE}")
    try:
        file = JsonFile(path / META_FILE)
        version = file.get("format", int)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file.path}: format is {version}, and this awq-compile reads {FORMAT_VERSION}",
                hint="quantise the model again with this version",
            )
        scheme = QuantScheme.parse(file.get("scheme", str))
        if scheme.linear.order != "NK":
            raise CheckpointError(f"{file.path}: scheme is {scheme.name}, and checkpoints are in the order NK")
        method = file.get("method", str)
        reports = tuple(LinearReport.from_json(entry) for entry in file.get("reports", list))
        config = read_config(path)
        files = _check_arrays(path, config, scheme)
    except CheckpointError as problem:
        raise CheckpointError(str(problem), hint=problem.hint or _again(path)) from None
    except AwqCompileError as problem:  # a ModelError or UsageError about what lies inside the checkpoint
        raise CheckpointError(f"{path} is damaged: {problem}", hint=_again(path)) from None
    return QuantizedModel(path, config, scheme, method, reports, file.data, files)


def _check_arrays(path: Path, config: ModelConfig, scheme: QuantScheme) -> dict[str, Path]:
    """Array name → file, after checking every name, shape and dtype against what the scheme asks for."""
    weight_map = JsonFile(path / INDEX_FILE).get("weight_map", dict)
    headers: dict[str, dict[str, Any]] = {}
    files = {}
    for name, shape, dtype in checkpoint_arrays(config, scheme):
        shard = weight_map.get(name)
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set("/\\\0") & set(shard):
            raise CheckpointError(f"{path / INDEX_FILE}: {name} lies in {shard!r}, expected a .safetensors beside it")
        if shard not in headers:
            headers[shard] = read_header(path / shard, ModelError)
        entry = headers[shard].get(name)
        if entry is None:
            raise CheckpointError(f"{path / shard} does not hold {name}")
        if tuple(entry["shape"]) != shape or entry["dtype"] != _DTYPES[dtype]:
            raise CheckpointError(
                f"{path / shard}: {name} is {entry['dtype']} {entry['shape']}, expected {_DTYPES[dtype]} {list(shape)}"
            )
        files[name] = path / shard
    return files


def write_json(path: Path, value: Any) -> None:
    """JSON with a fixed form, so that equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
