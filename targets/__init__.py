"""Imported as `awq_compile.targets`; the folder lies at the top level of the project."""

import difflib

if __name__ != "awq_compile.targets":
    raise ImportError("import awq_compile.targets, not targets")

from awq_compile.errors import UsageError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cpu import cpu_target
from awq_compile.targets.cuda import cuda_target
from awq_compile.targets.link import check_triple
from awq_compile.targets.metal import metal_target
from awq_compile.targets.opencl import android_target, opencl_target
from awq_compile.targets.vulkan.target import vulkan_target

_GPUS = {
    "cuda": cuda_target,
    "vulkan": vulkan_target,
    "metal": metal_target,
    "android": android_target,
    "opencl": opencl_target,
}
_CPUS = ("cpu", "cpu:x86_64-linux-gnu", "cpu:aarch64-linux-gnu", "cpu:arm64-apple-macos", "cpu:x86_64-windows-gnu")
_EXAMPLES = (
    *(*_CPUS, "cuda:sm_80", "cuda:sm_90", "metal", "metal:ios", "android:adreno", "android:mali"),
    *("vulkan", "vulkan@x86_64-windows-gnu", "opencl", "opencl@x86_64-windows-gnu"),
)


def resolve_target(name: str) -> TargetSpec:
    """The target that the user calls `name`: a preset, with what its own module says after a colon."""
    preset, _, argument = name.partition(":")
    if preset == "cpu":
        return cpu_target(argument)
    words, _, host = name.partition("@")
    preset, _, argument = words.partition(":")
    if preset in _GPUS:
        if host:
            check_triple(name, host)
        return _GPUS[preset](argument, host)
    near = difflib.get_close_matches(name, ["cpu", *_GPUS, *_EXAMPLES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known targets: cpu, {', '.join(_GPUS)}"
    raise UsageError(f"unknown target {name!r}", hint=hint)


def known_targets() -> tuple[str, ...]:
    """Names that `resolve_target` takes, for example."""
    return _EXAMPLES
