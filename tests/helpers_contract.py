"""Small DISTs with random weights, and edits of the VM code in their libraries: what tests of the contract need."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from awq_compile.artifact import DistWriter
from awq_compile.chat.config import chat_config
from awq_compile.chat.conv_template import ConvTemplate
from awq_compile.compiler import compile_library
from awq_compile.contract.executable import KIND, DType, Executable, parse_executable
from awq_compile.contract.objects import module_blob
from awq_compile.deploy.package import package_files
from awq_compile.formats import QuantizedMatrix, QuantScheme, QuantSpec
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.parameters import model_parameters
from awq_compile.models.weights import expected_tensors
from awq_compile.targets import resolve_target
from awq_compile.targets.vulkan.blob import parse_blob

OPTIONS = CompileOptions(context_window_size=128, prefill_chunk_size=64, max_batch_size=4)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


class RandomWeights:
    """Parameters of the right shapes: a `WeightSource`."""

    def __init__(self, config: ModelConfig, scheme: QuantScheme) -> None:
        self.shapes = dict(expected_tensors(config))
        self.scheme = scheme
        self.random = np.random.default_rng(3)

    def matrix(self, name: str) -> Any:
        outer = "embed_tokens" in name or "lm_head" in name
        spec = self.scheme.head if outer else self.scheme.linear
        arrays = {}
        for suffix, (shape, dtype) in spec.arrays(*self.shapes[name]).items():
            whole = np.issubdtype(np.dtype(dtype), np.integer)
            found = self.random.integers(0, 16, shape) if whole else self.random.normal(0, 0.05, shape)
            arrays[suffix] = found.astype(dtype)
        return QuantizedMatrix(spec, **arrays) if isinstance(spec, QuantSpec) else arrays["weight"]

    def vector(self, name: str) -> Any:
        return self.random.normal(1, 0.05, self.shapes[name]).astype(np.float16)


def write_dist(
    out: Path, model: Path, targets: Sequence[str], scheme: str = "w4g32", options: CompileOptions = OPTIONS
) -> Path:
    """A DIST as the main job writes it, without quantising and verifying."""
    config, parsed = read_config(model), QuantScheme.parse(scheme)
    conversation = ConvTemplate({"user": "", "assistant": ""}, ("",), stop_token_ids=config.eos_token_ids)
    with DistWriter(out) as dist:
        usage: dict[str, dict[str, int]] = {}
        size = dist.write_parameters(model_parameters(config, parsed), RandomWeights(config, parsed))
        tokenizer = dist.write_tokenizer(model)
        text = chat_config(config, parsed, options, conversation, tokenizer_dir=model, tokenizer_files=tokenizer)
        dist.write_text("mlc-chat-config.json", text)
        shutil.copyfile(model / "config.json", dist.path / "lib" / "config.json")
        for name in targets:
            target = resolve_target(name)
            library = dist.library_path("tiny", parsed, name, target.library_suffix, target.tvm_target)
            usage[name] = compile_library(config, parsed, target, options, library).memory_usage
        for file, of_app in package_files(dist.libraries, json.loads(text), size, usage).items():
            dist.write_text(file, of_app)
        dist.manifest("tiny", parsed, {"method": "random", **asdict(options)})
        dist.commit()
    return out


def payload(library: Path) -> bytes:
    """The VM code in a library."""
    return next(m.payload for m in parse_blob(module_blob(library)).modules if m.kind == KIND and m.payload)


def edit_executable(library: Path, change: Callable[[Executable], Executable]) -> None:
    """Rewrites the VM code in place. Texts of TVM's error messages give or take the bytes that it needs."""
    old = payload(library)
    executable = change(parse_executable(old))
    for index, constant in enumerate(executable.constants):
        missing = len(old) - len(dump_executable(executable))
        if isinstance(constant, str) and constant.startswith("ErrorContext"):
            text = constant.ljust(len(constant) + missing) if missing >= 0 else constant[: max(missing, -len(constant))]
            constants = (*executable.constants[:index], text, *executable.constants[index + 1 :])
            executable = replace(executable, constants=constants)
    new = dump_executable(executable)
    data = library.read_bytes()
    assert len(new) == len(old) and data.count(old) == 1
    library.write_bytes(data.replace(old, new))


def dump_executable(executable: Executable) -> bytes:
    """Inverse of `parse_executable`, written from TVM's description of the format; tensors become a zero."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def constant(value: Any) -> bytes:
        if isinstance(value, DType):
            kind = value.name.rstrip("0123456789")
            return struct.pack("<iBBH", 5, ("int", "uint", "float").index(kind), int(value.name[len(kind) :]), 1)
        if isinstance(value, str):
            return struct.pack("<i", 65) + text(value)
        if isinstance(value, tuple):
            return struct.pack(f"<iQ{len(value)}q", 69, len(value), *value)
        if isinstance(value, float):
            return struct.pack("<id", 3, value)
        if isinstance(value, int):
            return struct.pack("<iq", 1, value)
        return struct.pack("<iQQiiiBBHQI", 70, 0xDD5E40F096B4A13F, 0, 1, 0, 0, 2, 32, 1, 4, 0)

    parts = [struct.pack("<Q", 0xD225DE2F4214151E), text("0.14"), struct.pack("<Q", len(executable.functions))]
    for f in executable.functions:
        parts += [struct.pack("<i", f.kind), text(f.name), struct.pack("<4q", f.start, f.stop, f.num_arguments, 0)]
        parts += [struct.pack("<Q", len(f.parameters)), *map(text, f.parameters)]
    parts += [struct.pack("<QQ", 0, len(executable.constants)), *map(constant, executable.constants)]
    for numbers in (executable.offsets, executable.words):
        parts.append(struct.pack(f"<Q{len(numbers)}q", len(numbers), *numbers))
    return b"".join(parts)
