"""One library against the contract: its functions, `_metadata`, device code, symbols and prefix.

`read_library` takes the facts out of a file, `check_library` compares them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from awq_compile.compiler import system_lib_prefix
from awq_compile.contract.executable import KIND, OF_VM, Executable, parse_executable
from awq_compile.contract.finding import Finding
from awq_compile.contract.functions import FORBIDDEN, Demand, Sizes, demands
from awq_compile.contract.objects import ObjectFile, read_objects
from awq_compile.contract.signature import (
    ParamsType,
    Signature,
    TensorType,
    calls_of,
    prim_signature,
    relax_signature,
    returned_text,
)
from awq_compile.contract.symbols import HANDLE_INIT_ONCE, unknown_symbols
from awq_compile.errors import ArtifactError
from awq_compile.targets.vulkan.blob import parse_blob

_FUNCTION: Final = "__tvm_ffi_"  # before the name of every host PrimFunc
_CREATE_CACHE: Final = "vm.builtin.paged_attention_kv_cache_create"
_CACHE_ARGUMENTS: Final = (28, 29)  # TVM 0.27 takes both
_MAX_METADATA: Final = 64 << 20
_AGAIN: Final = "compile again with this version; if it comes again, it is a bug in awq-compile"


@dataclass(frozen=True)
class Library:
    """Facts of a library. `device` is the kind of device that it was compiled for, `llvm` for a CPU."""

    name: str
    device: str
    objects: tuple[ObjectFile, ...]
    kinds: tuple[str, ...]  # of the modules in the import tree
    executable: Executable
    metadata: Any  # JSON; None where the library has no `_metadata` or it is not JSON

    @property
    def prefix(self) -> str:
        """Of a system library."""
        return next((file.prefix for file in self.objects if file.prefix), "")

    @property
    def archive(self) -> bool:
        """Whether it is a set of objects that an app links."""
        return self.name.endswith(".tar")

    def signature(self, name: str) -> Signature | None:
        """Of a function as the engine finds it: VM code first, else a host PrimFunc."""
        if (function := self.executable.function(name)) is not None:
            return relax_signature(self.executable, function)
        for file in self.objects:
            for symbol in (self.prefix + name, name):
                if _FUNCTION + symbol in file.defined:
                    return prim_signature(symbol, file.data) or prim_signature(name, file.data)
        return None

    def functions(self) -> Iterator[str]:
        """Everything that can be looked up."""
        yield from (f.name for f in self.executable.functions if f.kind == OF_VM)
        for file in self.objects:
            yield from (s.removeprefix(_FUNCTION) for s in sorted(file.defined) if s.startswith(_FUNCTION))


def read_library(path: Path, device: str) -> Library:
    """Raises `ArtifactError` for a file that is not a library of TVM's virtual machine."""
    objects = tuple(read_objects(path))
    blob = next((file.blob for file in objects if file.blob is not None), None)
    if blob is None:
        raise ArtifactError(f"{path} has no symbol __tvm_ffi__library_bin, so TVM did not write it")
    try:
        modules = parse_blob(blob).modules
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: the module blob cannot be read: {error}") from None
    payload = next((m.payload for m in modules if m.kind == KIND), None)
    if payload is None:
        raise ArtifactError(f"{path} holds no {KIND}, only {', '.join(m.kind for m in modules)}")
    executable = parse_executable(payload)
    metadata = None
    if (function := executable.function("_metadata")) is not None:
        text = returned_text(executable, function) or ""
        try:
            metadata = json.loads(text) if len(text) <= _MAX_METADATA else None
        except (ValueError, RecursionError):
            metadata = None
    return Library(path.name, device, objects, tuple(m.kind for m in modules), executable, metadata)


def check_library(library: Library, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Compares a library with the contract and with mlc-chat-config.json, whose sizes the engine believes."""
    yield from _metadata(library, config)
    yield from _functions(library, config)
    yield from _cache(library)
    yield from _modules(library)
    yield from _symbols(library)


def _functions(library: Library, config: Mapping[str, Any]) -> Iterator[Finding]:
    model = config.get("model_config")
    hidden = model.get("hidden_size") if isinstance(model, dict) else None
    vocab = config.get("vocab_size")
    metadata = library.metadata if isinstance(library.metadata, dict) else {}
    params, prefill = metadata.get("params"), metadata.get("prefill_chunk_size")
    found = {name: library.signature(name) for name in _embedding_functions()}
    sizes = Sizes(
        hidden if isinstance(hidden, int) else _most(s.shape[-1] for s in _embeddings(found) if s.shape),
        vocab if isinstance(vocab, int) else 0,
        prefill if isinstance(prefill, int) else 0,
        len(params) if isinstance(params, list) else 0,
        _most(s.dtype for s in _embeddings(found)) or "float16",
    )
    for demand in demands(sizes, library.device):
        yield from _function(library, demand)
    for name, why in FORBIDDEN.items():
        if name in set(library.functions()):
            where = f"{library.name}: {name}"
            yield Finding("forbidden-function", where, f"no such function, for {why}", "one", "do not export it")
    described = _described(params)
    for function in (f for f in library.executable.functions if f.kind == OF_VM):
        for argument in relax_signature(library.executable, function).arguments:
            if isinstance(argument, ParamsType) and argument.tensors and argument.tensors != described:
                pairs = zip(argument.tensors, described, strict=False)
                index, (code, said) = next(
                    ((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), (0, ("other", "other"))
                )
                where = f"{library.name}: {function.name}, parameter {index}"
                yield Finding("parameter-order", where, f"{said} as in _metadata", str(code), _AGAIN)


def _function(library: Library, demand: Demand) -> Iterator[Finding]:
    where = f"{library.name}: {demand.name}"
    found = library.signature(demand.name)
    if found is None:
        has_it = demand.name in set(library.functions())
        what = "one whose signature cannot be read" if has_it else f"none: {demand.without}"
        yield Finding("missing-function", where, f"a function {demand.signature}", what, _AGAIN)
    elif demand.name == "alloc_embedding_tensor" and _larger(found, demand.signature):
        return
    elif not found.meets(demand.signature):
        same = len(found.arguments) == len(demand.signature.arguments)
        code = "wrong-signature" if same else "wrong-arity"
        yield Finding(code, where, str(demand.signature), str(found), _AGAIN)


def _larger(found: Signature, expected: Signature) -> bool:
    """Whether a tensor has at least the rows that are expected, and all else is equal."""
    one, other = found.result, expected.result
    if not (isinstance(one, TensorType) and isinstance(other, TensorType)) or found.arguments or len(one.shape) != 2:
        return False
    rows, least = one.shape[0], other.shape[0]
    same = (one.shape[1:], one.dtype) == (other.shape[1:], other.dtype)
    return same and isinstance(rows, int) and isinstance(least, int) and rows >= least


def _metadata(library: Library, config: Mapping[str, Any]) -> Iterator[Finding]:
    where = f"{library.name}: _metadata"
    data = library.metadata
    if not isinstance(data, dict):
        yield Finding("metadata", where, "a JSON object", "none", _AGAIN)
        return
    kinds: dict[str, type] = {"model_type": str, "quantization": str, "params": list, "memory_usage": dict}
    kinds |= dict.fromkeys(("context_window_size", "prefill_chunk_size", "max_batch_size"), int)
    for key, kind in {**kinds, "tensor_parallel_shards": int, "kv_cache": dict}.items():
        yield from _key(where, data, key, kind)
    for key in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        if data.get(key, 1) != 1:
            yield Finding("metadata", f"{where}.{key}", "1, a single device", repr(data.get(key)), _AGAIN)
    cache = data.get("kv_cache")
    if isinstance(cache, dict):
        for key in ("num_hidden_layers", "head_dim", "num_attention_heads", "num_key_value_heads"):
            yield from _key(f"{where}.kv_cache", cache, key, int)
    for key in ("model_type", "quantization"):
        if data.get(key) != config.get(key):
            expected = f"{config.get(key)!r}, as in mlc-chat-config.json"
            yield Finding("metadata", f"{where}.{key}", expected, repr(data.get(key)), _AGAIN)
    for index, param in enumerate(data["params"] if isinstance(data.get("params"), list) else ()):
        for key, kind in {"name": str, "shape": list, "dtype": str, "preprocs": list}.items():
            yield from _key(f"{where}.params[{index}]", param if isinstance(param, dict) else {}, key, kind)
    usage = data.get("memory_usage")
    if isinstance(usage, dict):
        for name in sorted({f.name for f in library.executable.functions if f.kind == OF_VM} - {"_metadata"}):
            if not _is(usage.get(name), int) or usage[name] < 0:
                place, what = f"{where}.memory_usage.{name}", "the bytes of its temporaries and results"
                yield Finding("memory-usage", place, what, repr(usage.get(name)), _AGAIN)


def _cache(library: Library) -> Iterator[Finding]:
    """The KV cache is made for the layers and heads that `_metadata` announces."""
    name = "create_tir_paged_kv_cache"
    function, data = library.executable.function(name), library.metadata
    announced = data.get("kv_cache") if isinstance(data, dict) else None
    if function is None or not isinstance(announced, dict):
        return
    where = f"{library.name}: {name}"
    calls = list(calls_of(library.executable, function, _CREATE_CACHE))
    if len(calls) != 1 or len(calls[0].arguments) not in _CACHE_ARGUMENTS:
        what = f"one call of {_CREATE_CACHE} with 28 or 29 arguments"
        yield Finding("kv-cache", where, what, str([len(c.arguments) for c in calls]), _AGAIN)
        return
    _, layers, heads, kv_heads, qk_dim, v_dim, *_ = calls[0].arguments
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "head_dim")
    found = (layers[-1] if isinstance(layers, tuple) and layers else None, heads, kv_heads, qk_dim, v_dim)
    for key, value in dict(zip(keys, found, strict=True)).items():
        if value != announced.get(key):
            yield Finding("kv-cache", f"{where}.{key}", f"{announced.get(key)!r}, as in _metadata", repr(value), _AGAIN)


def _modules(library: Library) -> Iterator[Finding]:
    if library.device != "llvm" and library.device not in library.kinds:
        expected = f"a module of the kind {library.device!r} among the imports"
        yield Finding("missing-module", library.name, expected, ", ".join(library.kinds), _AGAIN)


def _symbols(library: Library) -> Iterator[Finding]:
    defined = frozenset(symbol for file in library.objects for symbol in file.defined)
    undefined = frozenset(symbol for file in library.objects for symbol in file.undefined) - defined
    for symbol in unknown_symbols(undefined):
        where = f"{library.name}: {symbol}"
        expected = "only symbols of TVM's runtime and of C"
        yield Finding("undefined-symbol", where, expected, "an undefined symbol", "no phone's runtime gives it")
    if HANDLE_INIT_ONCE in undefined:
        yield Finding(
            "undefined-symbol",
            f"{library.name}: {HANDLE_INIT_ONCE}",
            "a symbol that every runtime gives",
            "one that is defined in ffi/init_once.cc of TVM-FFI, which mlc4j's tvm_runtime.h may not include",
            "add that file to the app's runtime if its linker misses the symbol",
            "warning",
        )
    if not library.archive:
        return
    expected = system_lib_prefix(Path(library.name))
    if library.prefix != expected:
        where = f"{library.name}: system-lib prefix"
        fix = "name the file as when it was compiled, or compile again"
        yield Finding(
            "prefix", where, f"{expected!r}, of the file's name, which is model_lib", repr(library.prefix), fix
        )
    for symbol in sorted(s for s in defined if s.startswith(_FUNCTION)):
        if not symbol.startswith(_FUNCTION + library.prefix):
            what = f"a name behind {_FUNCTION}{library.prefix}, for another library of the app may have the same"
            yield Finding("prefix", f"{library.name}: {symbol}", what, symbol, _AGAIN)
            break


def _key(where: str, data: Mapping[str, Any], key: str, kind: type) -> Iterator[Finding]:
    if not _is(data.get(key), kind):
        value = f"{data[key]!r:.80}" if key in data else "nothing"
        yield Finding("metadata", f"{where}.{key}", _WORDS[kind], value, _AGAIN)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_WORDS: Final[dict[type, str]] = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _described(params: Any) -> tuple[TensorType, ...]:
    """Types of `_metadata.params`; what is not one is left to `_metadata`."""
    found = []
    for param in params if isinstance(params, list) else ():
        shape = param.get("shape") if isinstance(param, dict) else None
        if isinstance(shape, list):
            found.append(TensorType(tuple(d if isinstance(d, int) else None for d in shape), str(param.get("dtype"))))
    return tuple(found)


def _embedding_functions() -> tuple[str, ...]:
    return ("embed", "alloc_embedding_tensor", "prefill", "decode", "batch_decode")


def _embeddings(found: Mapping[str, Signature | None]) -> Iterator[TensorType]:
    """The embeddings that functions take or give: most of them tell the model's dtype and hidden size."""
    for name, signature in found.items():
        if signature is not None:
            gives = name in ("embed", "alloc_embedding_tensor")
            kinds = [signature.result] if gives else list(signature.arguments[:1])
            yield from (kind for kind in kinds if isinstance(kind, TensorType))


def _most(values: Iterator[Any]) -> Any:
    return next((value for value, _ in Counter(values).most_common(1)), 0)
