"""Writes a small DIST around a floating-point library, in the documented format, to test what reads one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tvm
from helpers_build import ANY_SCHEME, build, float_params
from tvm import relax

from awq_compile.limits import CompileOptions
from awq_compile.manifest import FileEntry, LibraryEntry, Manifest
from awq_compile.models.config import ModelConfig
from awq_compile.models.decoder import export_decoder
from awq_compile.models.parameters import model_parameters


def link(library: str, objects: list[str], _options: Any = None) -> None:
    """A shared library, without a system compiler."""
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-shared", "-o", library, *objects], check=True)


def _metadata(config: ModelConfig, sizes: CompileOptions, params: list[dict[str, Any]]) -> str:
    return json.dumps(
        {
            "model_type": config.model_type,
            "quantization": ANY_SCHEME.name,
            "active_vocab_size": config.active_vocab_size,
            "context_window_size": sizes.context_window_size,
            "prefill_chunk_size": sizes.prefill_chunk_size,
            "sliding_window_size": -1,
            "attention_sink_size": -1,
            "max_batch_size": sizes.max_batch_size,
            "tensor_parallel_shards": 1,
            "params": params,
            "memory_usage": {},
            "kv_cache": {
                "num_hidden_layers": config.num_layers,
                "page_size": sizes.page_size,
                "head_dim": config.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
            },
        }
    )


def add_metadata(module: Any, text: str) -> None:
    """Adds the function `_metadata`."""
    builder = relax.BlockBuilder()
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(text))
    module["_metadata"] = builder.get()["_metadata"]


def write_manifest(folder: Path, library: str, **changed: Any) -> None:
    """manifest.json for the files that are there."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    libraries = {"cpu": LibraryEntry(library, {"kind": "llvm"})}
    text = Manifest("tiny", ANY_SCHEME.name, libraries, {}, {}, files).dumps()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text) | changed))


def write_float_dist(folder: Path, config: ModelConfig, state: dict[str, Any], sizes: CompileOptions) -> None:
    """A DIST with float32 weights, in two shards, and a stop token (1); no tokenizer."""
    (folder / "lib").mkdir(parents=True)
    tensors = dict(
        zip([p.name for p in model_parameters(config, ANY_SCHEME)], float_params(config, state), strict=True)
    )
    described = [{"name": n, "shape": list(t.shape), "dtype": str(t.dtype), "preprocs": []} for n, t in tensors.items()]
    module, _ = export_decoder(config, sizes, "float32")
    add_metadata(module, _metadata(config, sizes, described))
    library = "lib/tiny-cpu.so"
    executable = build(module)
    executable.export_library(str(folder / library), fcompile=link)

    shards = []
    names = list(tensors)
    for index, part in enumerate((names[:3], names[3:])):
        records, data = [], b""
        for name in part:
            array = tensors[name].numpy()
            record = {"name": name, "shape": list(array.shape), "dtype": "float32", "format": "raw"}
            records.append(record | {"nbytes": array.nbytes, "byteOffset": len(data)})
            data += array.tobytes()
        file = f"params_shard_{index}.bin"
        (folder / file).write_bytes(data)
        shards.append({"dataPath": file, "format": "raw-shard", "nbytes": len(data), "records": records})
    (folder / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": shards}))
    chat = {"model_type": config.model_type, "vocab_size": config.vocab_size, "conv_template": {"stop_token_ids": [1]}}
    (folder / "mlc-chat-config.json").write_text(json.dumps(chat))
    write_manifest(folder, library)
