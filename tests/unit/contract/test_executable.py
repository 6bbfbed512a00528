"""The VM code is read as TVM reads it, and damage ends in an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tvm
from helpers_contract import dump_executable, payload
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_compile.contract.executable import OF_VM, Call, Executable, Register, parse_executable
from awq_compile.contract.objects import read_objects
from awq_compile.contract.signature import relax_signature
from awq_compile.errors import ArtifactError

CPU = "lib/tiny-w4g32-cpu.so"


def described(executable: Executable) -> dict[str, list[tuple[str, int]]]:
    """Function → (callee, registers among the arguments) of every call."""
    return {
        function.name: [
            (step.function, sum(isinstance(a, Register) for a in step.arguments))
            for step in executable.instructions(function)
            if isinstance(step, Call)
        ]
        for function in executable.functions
        if function.kind == OF_VM
    }


def test_the_code_is_what_tvm_says(built: Path) -> None:
    """TVM's own disassembly has the same functions, which call the same ones with as many registers."""
    text = tvm.runtime.load_module(str(built / CPU))["as_text"]()
    expected: dict[str, list[tuple[str, int]]] = {}
    for block in text.split("\n@"):
        name, colon, body = block.removeprefix("@").partition(":\n")
        if colon:
            calls = re.findall(r"call +(\S+) +in: (.*?) *dst:", body)
            expected[name] = [(callee, arguments.count("%")) for callee, arguments in calls]
    found = described(parse_executable(payload(built / CPU)))
    assert found == expected and len(found) >= 17


def test_reading_inverts_writing(built: Path) -> None:
    executable = parse_executable(payload(built / CPU))
    assert parse_executable(dump_executable(executable)) == executable


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_and_nothing_else(built: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with eight bytes of it replaced."""
    whole = payload(built / CPU)
    at = data.draw(st.integers(0, len(whole) - 8))
    new = data.draw(st.one_of(st.none(), st.binary(min_size=8, max_size=8)))
    try:
        executable = parse_executable(whole[:at] if new is None else whole[:at] + new + whole[at + 8 :])
        for function in executable.functions:
            if function.kind == OF_VM:
                relax_signature(executable, function)
    except ArtifactError:
        pass


def test_objects_are_read_or_refused(built: Path, tmp_path: Path) -> None:
    """Symbols are those that a linker sees."""
    host, device, _ = read_objects(built / "lib/tiny-w4g32-android.tar")
    assert device.prefix == "tiny_w4g32_android_" and device.blob is not None and host.blob is None
    assert "__tvm_ffi_tiny_w4g32_android_gather_probs" in host.defined
    assert {"TVMFFIFunctionCall", "TVMFFIHandleInitOnce"} <= host.undefined
    (library,) = read_objects(built / CPU)
    assert "expf" in library.undefined and "__tvm_ffi_gather_probs" in library.defined
    for name, content in (("text.so", b"hello"), ("broken.tar", b"x" * 600)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError):
            read_objects(tmp_path / name)
