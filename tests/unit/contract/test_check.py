"""What is built keeps the contract, and each way of breaking it is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_contract import edit_executable

from awq_compile.cli.main import main
from awq_compile.contract.check import check_contract, require_contract
from awq_compile.contract.executable import DType, Executable, VMFunction
from awq_compile.contract.objects import read_objects
from awq_compile.errors import ArtifactError, CompileError

CPU, ANDROID = "lib/tiny-w4g32-cpu.so", "lib/tiny-w4g32-android.tar"
CONFIG, CACHE, MANIFEST = "mlc-chat-config.json", "tensor-cache.json", "manifest.json"
PACKAGE = "mlc-package-config.json"
Fault = Callable[[Path], None]


def test_what_is_built_keeps_the_contract(built: Path) -> None:
    assert check_contract(built) == []
    require_contract(built)


def test_what_an_app_may_have_to_add_is_a_warning(dist: Path) -> None:
    """Objects without our own TVMFFIHandleInitOnce, as MLC's compiler makes them."""
    *_, own = read_objects(dist / ANDROID)
    assert "TVMFFIHandleInitOnce" in own.defined and own.undefined == {"TVMFFIErrorSetRaisedFromCStrParts"}
    in_bytes(ANDROID, own.data, own.data.replace(b"HandleInitOnce", b"HandleInitTwice"[:14]))(dist)
    digest = hashlib.sha256((dist / ANDROID).read_bytes()).hexdigest()
    in_json(MANIFEST, lambda data: data["files"][ANDROID].update(sha256=digest))(dist)
    (warning,) = check_contract(dist)
    assert warning.severity == "warning" and "TVMFFIHandleInitOnce" in warning.where
    require_contract(dist)


def in_json(file: str, change: Callable[[Any], Any]) -> Fault:
    def fault(dist: Path) -> None:
        data = json.loads((dist / file).read_text(encoding="utf-8"))
        change(data)
        (dist / file).write_text(json.dumps(data), encoding="utf-8")

    return fault


def in_bytes(file: str, old: bytes, new: bytes) -> Fault:
    def fault(dist: Path) -> None:
        assert len(old) == len(new)
        data = (dist / file).read_bytes()
        assert old in data
        (dist / file).write_bytes(data.replace(old, new))

    return fault


def in_code(change: Callable[[Executable], Executable], file: str = CPU) -> Fault:
    return lambda dist: edit_executable(dist / file, change)


def of_function(name: str, /, **changed: Any) -> Callable[[Executable], Executable]:
    def change(executable: Executable) -> Executable:
        assert executable.function(name) is not None
        functions = tuple(replace(f, **changed) if f.name == name else f for f in executable.functions)
        return replace(executable, functions=functions)

    return change


def of_constants(old: Any, new: Any) -> Callable[[Executable], Executable]:
    def change(executable: Executable) -> Executable:
        assert old in executable.constants
        return replace(executable, constants=tuple(new if c == old else c for c in executable.constants))

    return change


def in_metadata(edit: Callable[[Any], Any]) -> Fault:
    def change(executable: Executable) -> Executable:
        constants = list(executable.constants)
        (index,) = (i for i, c in enumerate(constants) if isinstance(c, str) and c.startswith("{"))
        data = json.loads(str(constants[index]))
        edit(data)
        constants[index] = json.dumps(data)
        return replace(executable, constants=tuple(constants))

    return in_code(change)


def exported(name: str) -> Callable[[Executable], Executable]:
    def change(executable: Executable) -> Executable:
        function = executable.function("decode")
        assert isinstance(function, VMFunction)
        return replace(executable, functions=(*executable.functions, replace(function, name=name)))

    return change


def other_immediate(executable: Executable, old: int, new: int, callee: str) -> Executable:
    """In the first call of `callee`, an immediate argument replaced."""
    number = next(i for i, f in enumerate(executable.functions) if f.name == callee)
    words = list(executable.words)
    at = next(o for o in executable.offsets if words[o] == 1 and words[o + 2] == number)
    place = next(i for i in range(at + 4, at + 4 + words[at + 3]) if words[i] == (1 << 56 | old))
    words[place] = 1 << 56 | new
    return replace(executable, words=tuple(words))


def moved(old: str, new: str) -> Fault:
    def fault(dist: Path) -> None:
        (dist / old).rename(dist / new)
        in_json(MANIFEST, lambda data: data["libraries"]["android"].update(path=new))(dist)

    return fault


def twice(dist: Path) -> None:
    """A second library under the name of another folder, so with the same prefix."""
    (dist / "lib/more").mkdir()
    (dist / "lib/more/tiny-w4g32-android.tar").write_bytes((dist / ANDROID).read_bytes())
    entry = {"path": "lib/more/tiny-w4g32-android.tar", "tvm_target": {"kind": "opencl"}}
    in_json(MANIFEST, lambda data: data["libraries"].update(other=entry))(dist)


def first_record(data: Any) -> Any:
    return data["records"][0]["records"][0]


def one_large_shard(dist: Path) -> None:
    """Of 33 MiB, in which all parameters lie."""
    in_json(CACHE, lambda data: data["records"][0].update(nbytes=33 << 20))(dist)
    with (dist / "params_shard_0.bin").open("ab") as file:
        file.truncate(33 << 20)


def template(**changed: Any) -> Fault:
    return in_json(CONFIG, lambda data: data["conv_template"].update(changed))


def without(*keys: str) -> Fault:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return in_json(CONFIG, change)


def changed_byte(file: str) -> Fault:
    """In the middle, where nothing that is read says what must be there."""

    def fault(dist: Path) -> None:
        data = bytearray((dist / file).read_bytes())
        data[len(data) // 2] ^= 1
        (dist / file).write_bytes(data)

    return fault


def as_tokenizer(text: str) -> Fault:
    return lambda dist: (dist / "tokenizer.json").write_text(text) and None


def strange_file(dist: Path) -> None:
    """A file outside, of the size and the digest that the manifest says."""
    (dist.parent / "x").write_bytes(b"x")
    entry = {"nbytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    in_json(MANIFEST, lambda data: data["files"].update({"../x": entry}))(dist)


CACHE_CREATE = "vm.builtin.paged_attention_kv_cache_create"
PENALTIES = b"penalties: Tensor([q, 3], float32)"

# name → (fault, code of the finding, what its place and its values must say)
FAULTS: dict[str, tuple[Fault, str, tuple[str, ...]]] = {
    "no function of the VM": (
        in_code(of_function("batch_decode", name="batch_decodf")),
        "missing-function",
        ("cpu.so: batch_decode", "fails even with one request"),
    ),
    "no PrimFunc": (
        in_bytes(CPU, b"__tvm_ffi_apply_bitmask_inplace", b"__tvm_ffi_apply_bitmask_inplacf"),
        "missing-function",
        ("apply_bitmask_inplace", "does not start"),
    ),
    "no function for speculation": (
        in_code(of_function("get_logits", name="get_logitz")),
        "missing-function",
        ("get_logits",),
    ),
    "too few arguments": (
        in_code(of_function("prefill", num_arguments=2)),
        "wrong-arity",
        ("cpu.so: prefill", "((1, n, 64) float32, object, 12 parameters)", "((1, s0, 64) float32, object)"),
    ),
    "tokens of another dtype": (
        in_code(of_constants(DType("int32"), DType("int64"))),
        "wrong-signature",
        ("embed", "(n,) int32", "(s0,) int64"),
    ),
    "PrimFunc of another dtype": (
        in_bytes(ANDROID, PENALTIES, PENALTIES.replace(b"float32", b"float16")),
        "wrong-signature",
        ("android.tar: apply_penalty_inplace", "(q, 3) float32", "(q, 3) float16"),
    ),
    "one row too few to embed into": (
        in_code(of_constants((64, 64), (63, 64))),
        "wrong-signature",
        ("alloc_embedding_tensor", "(64, 64) float32", "(63, 64) float32"),
    ),
    "another hidden size": (
        in_json(CONFIG, lambda data: data["model_config"].update(hidden_size=96)),
        "wrong-signature",
        ("decode", "(1, 1, 96)", "(1, 1, 64)"),
    ),
    "another vocabulary": (
        in_json(CONFIG, lambda data: data.update(vocab_size=4095)),
        "wrong-signature",
        ("decode", "(1, 1, 4095) float32", "(1, 1, 4096) float32"),
    ),
    "a state of an RNN": (
        in_code(exported("create_rnn_state")),
        "forbidden-function",
        ("create_rnn_state", "instead of create_tir_paged_kv_cache"),
    ),
    "other KV heads": (
        in_code(lambda e: other_immediate(e, 1, 2, CACHE_CREATE)),
        "kv-cache",
        ("num_key_value_heads", "1, as in _metadata", "2"),
    ),
    "metadata without a key": (
        in_metadata(lambda data: data.pop("max_batch_size")),
        "metadata",
        ("_metadata.max_batch_size", "a whole number", "nothing"),
    ),
    "metadata without memory": (
        in_metadata(lambda data: data.update(memory_usage={})),
        "memory-usage",
        ("_metadata.memory_usage.decode", "the bytes"),
    ),
    "several shards": (
        in_metadata(lambda data: data.update(tensor_parallel_shards=2)),
        "metadata",
        ("tensor_parallel_shards", "1, a single device", "2"),
    ),
    "parameters in another order": (
        in_metadata(lambda data: data["params"].reverse()),
        "parameter-order",
        ("parameter 0", "(4096, 64) float16"),
    ),
    "a parameter of another shape": (
        in_json(CACHE, lambda data: first_record(data).update(shape=[64, 4096])),
        "wrong-parameter",
        ("model.embed_tokens.weight", "[4096, 64] float16", "[64, 4096] float16"),
    ),
    "a parameter under another name": (
        in_json(CACHE, lambda data: first_record(data).update(name="embed")),
        "missing-parameter",
        ("model.embed_tokens.weight", "no such parameter"),
    ),
    "rounded to bfloat16": (
        in_json(CACHE, lambda data: first_record(data).update(format="f32-to-bf16")),
        "tensors",
        ("format", "raw", "f32-to-bf16"),
    ),
    "a shard of 33 MiB": (one_large_shard, "shard", ("params_shard_0.bin", "33554432", "34603008")),
    "a truncated shard": (
        lambda dist: (dist / "params_shard_0.bin").write_bytes(b"x") and None,
        "shard",
        ("params_shard_0.bin", "1 bytes"),
    ),
    "a shard that leads out": (
        in_json(CACHE, lambda data: data["records"][0].update(dataPath="../manifest.json")),
        "shard",
        ("dataPath", "a file in the directory", "../manifest.json"),
    ),
    "no key for Python": (without("attention_sink_size"), "config", ("attention_sink_size", "Python", "no such key")),
    "no key for C++": (without("model_config", "prefill_chunk_size"), "config", ("model_config.prefill_chunk_size",)),
    "no template": (without("conv_template"), "config", ("conv_template", "JSON-FFI")),
    "no stop tokens": (without("conv_template", "stop_token_ids"), "config", ("conv_template.stop_token_ids",)),
    "eos does not stop": (template(stop_token_ids=[]), "stop-tokens", ("1, the eos_token_id",)),
    "no role": (template(roles={"user": ""}), "config", ("conv_template.roles.assistant",)),
    "no tokenizer": (lambda dist: (dist / "tokenizer.json").unlink(), "tokenizer", ("tokenizer.json", "none")),
    "tokenizer not listed": (
        in_json(CONFIG, lambda data: data.update(tokenizer_files=[])),
        "tokenizer",
        ("tokenizer_files", "MLCChat"),
    ),
    "no OpenCL module": (
        in_bytes(ANDROID, b"\6\0\0\0\0\0\0\0opencl", b"\6\0\0\0\0\0\0\0vulkan"),
        "missing-module",
        ("android.tar", "'opencl'"),
    ),
    "an unknown symbol": (
        in_bytes(ANDROID, b"TVMFFIFunctionCall", b"TVMFFIFunctionCaII"),
        "undefined-symbol",
        ("android.tar: TVMFFIFunctionCaII",),
    ),
    "a symbol without the prefix": (
        in_bytes(ANDROID, b"__tvm_ffi_tiny_w4g32_android_rms_norm", b"__tvm_ffi_tiny_w4g33_android_rms_norm"),
        "prefix",
        ("rms_norm", "__tvm_ffi_tiny_w4g32_android_"),
    ),
    "another file name": (
        moved(ANDROID, "lib/phone.tar"),
        "prefix",
        ("phone.tar", "'model_phone_'", "'tiny_w4g32_android_'"),
    ),
    "two libraries with one prefix": (twice, "prefix", ("another prefix than 'tiny_w4g32_android_'", "the same")),
    "a library that the app does not find": (
        in_json(PACKAGE, lambda data: data.update(model_lib_path_for_prepare_libs={"tiny_android": ANDROID})),
        "package",
        ("tiny_android", "the archive with the prefix 'tiny_android_'"),
    ),
    "no library": (lambda dist: (dist / CPU).unlink(), "missing-library", (CPU,)),
    "a library that is none": (
        lambda dist: (dist / CPU).write_bytes(b"text") and None,
        "unreadable-library",
        (CPU, "not an object file"),
    ),
    "no libraries": (
        in_json(MANIFEST, lambda data: data.update(libraries={})),
        "missing-library",
        ("manifest.json: libraries", "none"),
    ),
    "a tokenizer that ends early": (as_tokenizer("{"), "tokenizer", ("tokenizer.json: expected a tokenizer",)),
    "a tokenizer that is a list": (as_tokenizer("[]"), "tokenizer", ("tokenizer.json: expected a tokenizer",)),
    "a file that leads out": (strange_file, "missing-file", ("manifest.json: files", "'../x'")),
    "a missing file": (
        lambda dist: (dist / "lib/config.json").unlink(),
        "missing-file",
        ("lib/config.json",),
    ),
    "a longer file": (
        lambda dist: (dist / "lib/config.json").write_bytes(b" " * 9) and None,
        "damaged-file",
        ("lib/config.json", "bytes, as in manifest.json", "9 bytes"),
    ),
    "a changed library": (changed_byte(ANDROID), "damaged-file", (ANDROID, "sha256", "as in manifest.json")),
    "a changed parameter": (changed_byte("params_shard_0.bin"), "damaged-file", ("params_shard_0.bin", "sha256")),
    "no options": (
        in_json(MANIFEST, lambda data: data.update(options={})),
        "manifest",
        ("manifest.json", "context_window_size"),
    ),
    "an option of another type": (
        in_json(MANIFEST, lambda data: data["options"].update(page_size="x")),
        "manifest",
        ("manifest.json", "page_size is 'x'"),
    ),
    "a library that is not among the files": (
        in_json(MANIFEST, lambda data: data["files"].pop(ANDROID)),
        "directory",
        ("android.tar", "not among its files"),
    ),
    "no configuration": (lambda dist: (dist / CONFIG).unlink(), "missing-file", (CONFIG,)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, dist: Path) -> None:
    """By an error that says where it is and both values, and what is whole is not among the errors."""
    fault, code, words = FAULTS[name]
    fault(dist)
    findings = [f for f in check_contract(dist) if f.severity == "error"]
    found = [f for f in findings if f.code == code]
    assert any(all(word in str(f) for word in words) for f in found), "\n".join(map(str, findings))
    assert all(f.fix for f in findings)
    if any("sha256" in str(f) for f in found):  # at the end of a build contents are not read again
        require_contract(dist)
        return
    with pytest.raises(CompileError):
        require_contract(dist)


def test_the_command_tells_people_and_programs(dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-contract", str(dist)]) == 0
    assert "keeps the contract" in capsys.readouterr().out
    in_code(of_function("prefill", num_arguments=2))(dist)
    assert main(["check-contract", str(dist)]) == 1
    told = capsys.readouterr().out
    assert "breaks the contract of the MLC runtime in 1 place" in told and "prefill" in told
    assert main(["check-contract", str(dist), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    (error,) = (f for f in result["findings"] if f["severity"] == "error")
    assert not result["passed"] and error["where"] == "tiny-w4g32-cpu.so: prefill"


def test_verify_has_no_library_to_run(dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that was verified is no success."""
    in_json(MANIFEST, lambda data: data.update(libraries={}))(dist)
    assert main(["verify", str(dist)]) == 1
    assert "manifest.json names no library" in capsys.readouterr().err


def test_what_is_no_dist_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError):
        check_contract(tmp_path)
    assert main(["check-contract", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
