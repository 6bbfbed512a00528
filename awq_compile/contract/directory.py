"""A model directory against the contract: mlc-chat-config.json, tensor-cache.json and the tokenizer's files.

Sources: cpp/serve/{config,model}.cc, cpp/json_ffi/, cpp/tokenizers/ and python/mlc_llm/protocol of mlc-llm, and TVM's
tensor_cache_support.cc. Everything is read like a stranger's file: only regular files inside the directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from awq_compile.contract.finding import Finding
from awq_compile.errors import ArtifactError
from awq_compile.runtime.tokenizer import Tokenizer

CHAT_CONFIG: Final = "mlc-chat-config.json"
TENSOR_CACHE: Final = "tensor-cache.json"
SHARD_BYTES: Final = 32 << 20  # a shard with a single larger parameter is larger
_MAX_JSON_BYTES: Final = 256 << 20
_BYTES: Final = {"uint32": 4, "int32": 4, "uint16": 2, "uint8": 1, "int8": 1, "float16": 2, "float32": 4}
_AGAIN: Final = "compile again"

# Key → type and who reads it strictly.
_CONFIG: Final[dict[str, tuple[type, str]]] = {
    "model_type": (str, "C++"),
    "quantization": (str, "Python"),
    "vocab_size": (int, "C++"),
    "prefill_chunk_size": (int, "C++"),
    "context_window_size": (int, "Python, MLCChat"),
    "sliding_window_size": (int, "Python"),
    "attention_sink_size": (int, "Python"),
    "tensor_parallel_shards": (int, "Python"),
    "model_config": (dict, "C++, JSON-FFI"),
    "conv_template": (dict, "JSON-FFI, Python"),
    "tokenizer_files": (list, "MLCChat"),
}
_TEMPLATE: Final[dict[str, type]] = {  # all by JSON-FFI; roles and seps by Python too
    "system_template": str,
    "system_message": str,
    "add_role_after_system_message": bool,
    "roles": dict,
    "messages": list,
    "seps": list,
    "role_content_sep": str,
    "role_empty_sep": str,
    "stop_str": list,
    "stop_token_ids": list,
}
_WORDS: Final[dict[type, str]] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Record:
    """A parameter in tensor-cache.json."""

    shape: tuple[int, ...]
    dtype: str


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ArtifactError` for anything else."""
    try:
        if not path.is_file():
            raise ArtifactError("no file")
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ArtifactError(f"a file of {size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ArtifactError("a file that is not JSON") from None
    except OSError as error:
        raise ArtifactError(f"a file that cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"a JSON {type(value).__name__}")
    return value


def check_config(config: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    """The keys that C++, JSON-FFI, Python and MLCChat read, and the tokenizer."""
    for key, (kind, reader) in _CONFIG.items():
        yield from _key(CHAT_CONFIG, config, key, kind, reader)
    if "rwkv" in str(config.get("model_type")):
        yield Finding(
            "config", f"{CHAT_CONFIG}: model_type", "no rwkv in it, for a KV cache", str(config["model_type"]), _AGAIN
        )
    model = config.get("model_config")
    if isinstance(model, dict):
        for key in ("vocab_size", "prefill_chunk_size", "hidden_size"):
            yield from _key(f"{CHAT_CONFIG}: model_config", model, key, int, "C++")
        for key in ("vocab_size", "prefill_chunk_size"):
            if _is(model.get(key), int) and model[key] != config.get(key):
                where = f"{CHAT_CONFIG}: model_config.{key}"
                yield Finding("config", where, f"{config.get(key)!r}, as at the top", repr(model[key]), _AGAIN)
    yield from _template(config)
    yield from _tokenizer(config, folder)


def _template(config: Mapping[str, Any]) -> Iterator[Finding]:
    template = config.get("conv_template")
    if not isinstance(template, dict):
        return
    where = f"{CHAT_CONFIG}: conv_template"
    for key, kind in _TEMPLATE.items():
        yield from _key(where, template, key, kind, "JSON-FFI")
    roles = template.get("roles")
    if isinstance(roles, dict):
        for role in ("user", "assistant"):
            yield from _key(f"{where}.roles", roles, role, str, "JSON-FFI")
    seps = template.get("seps")
    if isinstance(seps, list) and (not 1 <= len(seps) <= 2 or not all(isinstance(sep, str) for sep in seps)):
        yield Finding("config", f"{where}.seps", "one or two texts", f"{seps!r:.80}", _AGAIN)
    stops, vocab = template.get("stop_token_ids"), config.get("vocab_size")
    if isinstance(stops, list) and isinstance(vocab, int):
        if wrong := [stop for stop in stops if not _is(stop, int) or not 0 <= stop < vocab]:
            what = f"token ids below {vocab}"
            yield Finding("stop-tokens", f"{where}.stop_token_ids", what, f"{wrong[0]!r:.80}", _AGAIN)
        eos = config.get("eos_token_id")
        for token in eos if isinstance(eos, list) else [eos]:
            if _is(token, int) and token not in stops:
                what = f"{token}, the eos_token_id, for the engine looks at no other key"
                yield Finding("stop-tokens", f"{where}.stop_token_ids", what, f"{stops!r:.80}", _AGAIN)


def _tokenizer(config: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    listed = config.get("tokenizer_files")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    for name in names:
        if not is_inside(folder, name):
            where = f"{CHAT_CONFIG}: tokenizer_files"
            yield Finding("tokenizer", where, f"{name!r:.80} in the directory", "no such file", _AGAIN)
    whole = (["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt", "added_tokens.json"])
    if not any(all(is_inside(folder, name) for name in group) for group in whole):
        what = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt and added_tokens.json"
        yield Finding("tokenizer", "tokenizer", what, "none", "copy the tokenizer's files from the model")
    elif not any(set(group) <= set(names) for group in whole):
        where = f"{CHAT_CONFIG}: tokenizer_files"
        yield Finding("tokenizer", where, "the tokenizer's files, which MLCChat downloads", str(names), _AGAIN)
    if is_inside(folder, "tokenizer.json"):
        try:
            Tokenizer(folder)
        except ArtifactError as error:
            yield Finding("tokenizer", "tokenizer.json", "a tokenizer", f"{error!s:.200}", _AGAIN)


def check_tensors(cache: Mapping[str, Any], folder: Path) -> tuple[dict[str, Record], list[Finding]]:
    """The parameters of tensor-cache.json by name, and what is wrong with the file or the shards."""
    found: dict[str, Record] = {}
    findings: list[Finding] = []
    shards = cache.get("records")
    if not isinstance(shards, list):
        findings.append(Finding("tensors", f"{TENSOR_CACHE}: records", "a list", f"{shards!r:.80}", _AGAIN))
    for index, shard in enumerate(shards if isinstance(shards, list) else ()):
        findings += _shard(shard if isinstance(shard, dict) else {}, index, folder, found)
    return found, findings


def _shard(shard: Mapping[str, Any], index: int, folder: Path, found: dict[str, Record]) -> Iterator[Finding]:
    where = f"{TENSOR_CACHE}: records[{index}]"
    wrong = [*_key(where, shard, "dataPath", str, "C++"), *_key(where, shard, "nbytes", int, "C++")]
    wrong += _key(where, shard, "records", list, "C++")
    yield from wrong
    if wrong:
        return
    if shard.get("format") != "raw-shard":
        yield Finding("tensors", f"{where}.format", "raw-shard", f"{shard.get('format')!r:.80}", _AGAIN)
    name, size = shard["dataPath"], shard["nbytes"]
    if not is_inside(folder, name):
        yield Finding("shard", f"{where}.dataPath", "a file in the directory", f"{name!r:.80}", _AGAIN)
    elif (actual := (folder / name).stat().st_size) != size:
        yield Finding("shard", name, f"{size} bytes, as in {TENSOR_CACHE}", f"{actual} bytes", _AGAIN)
    if size > SHARD_BYTES and len(shard["records"]) > 1:
        what = f"at most {SHARD_BYTES} bytes for {len(shard['records'])} parameters"
        yield Finding("shard", name, what, f"{size} bytes", _AGAIN)
    for record in shard["records"]:
        yield from _record(record if isinstance(record, dict) else {}, name, size, found)


def _record(record: Mapping[str, Any], file: str, size: int, found: dict[str, Record]) -> Iterator[Finding]:
    name = str(record.get("name"))
    where = f"{TENSOR_CACHE}: {name:.80}"
    kinds: dict[str, type] = {"name": str, "shape": list, "dtype": str, "nbytes": int, "byteOffset": int}
    wrong = [finding for key, kind in kinds.items() for finding in _key(where, record, key, kind, "C++")]
    yield from wrong
    if wrong:
        return
    shape, dtype, nbytes, start = (record[key] for key in ("shape", "dtype", "nbytes", "byteOffset"))
    if record.get("format") != "raw":
        what = "raw: any other rounds the values (f32-to-bf16), or is not read"
        yield Finding("tensors", f"{where}.format", what, f"{record.get('format')!r:.80}", _AGAIN)
    if not all(_is(d, int) and d > 0 for d in shape) or dtype not in _BYTES:
        what = "positive sizes and a dtype of raw parameters"
        yield Finding("tensors", where, what, f"{shape!r:.80} {dtype:.80}", _AGAIN)
        return
    if nbytes != math.prod(shape) * _BYTES[dtype]:
        what = f"{math.prod(shape) * _BYTES[dtype]} bytes for {shape} {dtype}"
        yield Finding("tensors", f"{where}.nbytes", what, str(nbytes), _AGAIN)
    if not 0 <= start <= size - nbytes:
        what = f"bytes within the {size} of {file}"
        yield Finding("tensors", f"{where}.byteOffset", what, f"{start} to {start + nbytes}", _AGAIN)
    if name in found:
        yield Finding("tensors", where, "a name that appears once", "two records", _AGAIN)
    found[name] = Record(tuple(shape), dtype)


def check_parameters(
    library: str, metadata: Any, tensors: Mapping[str, Record], config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Every parameter that a library's `_metadata` asks for is there, with its shape and dtype."""
    params = metadata.get("params") if isinstance(metadata, dict) else None
    for param in params if isinstance(params, list) else ():
        name, shape = (param.get("name"), param.get("shape")) if isinstance(param, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(shape, list):
            continue  # _metadata itself is wrong
        # A text names a key of mlc-chat-config.json with the size.
        sizes = tuple(config.get(size) if isinstance(size, str) else size for size in shape)
        record, where = tensors.get(name), f"{TENSOR_CACHE}: {name:.80}"
        expected = f"{list(sizes)} {param.get('dtype')}, as in _metadata of {library}"
        if record is None:
            yield Finding("missing-parameter", where, expected, "no such parameter", _AGAIN)
        elif (record.shape, record.dtype) != (sizes, param.get("dtype")):
            yield Finding("wrong-parameter", where, expected, f"{list(record.shape)} {record.dtype}", _AGAIN)


def _key(where: str, data: Mapping[str, Any], key: str, kind: type, reader: str) -> Iterator[Finding]:
    if not _is(data.get(key), kind):
        value = f"{data[key]!r:.80}" if key in data else "no such key"
        sep = ": " if where.endswith(".json") else "."
        yield Finding("config", f"{where}{sep}{key}", f"{_WORDS[kind]} ({reader} reads it)", value, _AGAIN)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def is_inside(folder: Path, name: str) -> bool:
    """Whether `name` is a regular file in the folder, not reached through `..` or a link out of it."""
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        return False
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())
