"""Imported as `awq_compile.targets`; the folder lies at the top level of the project."""

import difflib

if __name__ != "awq_compile.targets":
    raise ImportError("import awq_compile.targets, not targets")

from awq_compile.errors import UsageError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cpu import cpu_target

_PRESETS = {"cpu": cpu_target}
_EXAMPLES = ("cpu", "cpu:x86_64-linux-gnu", "cpu:aarch64-linux-gnu", "cpu:arm64-apple-macos", "cpu:x86_64-windows-gnu")


def resolve_target(name: str) -> TargetSpec:
    """The target that the user calls `name`: a preset, with what its own module says after a colon."""
    preset, _, argument = name.partition(":")
    if preset not in _PRESETS:
        near = difflib.get_close_matches(name, [*_PRESETS, *_EXAMPLES], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known targets: {', '.join(_PRESETS)}"
        raise UsageError(f"unknown target {name!r}", hint=hint)
    return _PRESETS[preset](argument)


def known_targets() -> tuple[str, ...]:
    """Names that `resolve_target` takes, for example."""
    return _EXAMPLES
