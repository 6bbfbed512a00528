"""Targets built one after the other in a process do not touch each other (TVM's rules change the module they get)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from helpers_models import DEMO

from awq_compile.compiler import compile_library
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config
from awq_compile.targets import resolve_target

OPTIONS = CompileOptions(context_window_size=64, prefill_chunk_size=32, max_batch_size=2)


def build_in_order(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, str]]:
    """Target → file → digest of what its build leaves: the library and its launch tables."""
    config = replace(read_config(DEMO), num_layers=1)
    found = {}
    for name in names:
        target, out = resolve_target(name), folder / name.replace(":", "-")
        out.mkdir(parents=True)
        compile_library(config, QuantScheme.parse("w4g32"), target, OPTIONS, out / f"lib{target.library_suffix}")
        files = sorted(p for p in out.rglob("*") if p.is_file())
        found[name] = {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return found


def test_targets_in_two_orders(tmp_path: Path) -> None:
    """Equal bytes, whichever comes first; Vulkan's brings its own code generator, which must leave with it."""
    names = ("opencl", "vulkan", "metal")
    there = build_in_order(names, tmp_path / "there")
    back = build_in_order(names[::-1], tmp_path / "back")
    assert there == back
    assert all(found for found in there.values())
