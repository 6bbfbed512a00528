"""Dependencies point one way: a module imports only what lies in its own layer or below."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import awq_compile

PACKAGE = Path(awq_compile.__file__).parent

# From the bottom up. The longest matching prefix decides. What a model *is* (its configuration, names and
# files) is data that the quantiser reads; how it is *computed* (decoder, KV cache) lies above the targets.
LAYERS = (
    ("errors", "settings", "ours", "json_input"),
    ("formats", "limits", "reference", "problem", "schedules"),
    ("models.architectures", "models.config", "models.parameters", "models.weights", "models"),
    ("awq", "targets"),
    ("models.decoder", "models.kv_cache", "models.sampling", "models.gpu_sampling", "kernels"),
    ("passes", *(f"tuning.{name}" for name in ("templates", "space", "cost", "fingerprint", "record", "database"))),
    (
        *("compiler", "artifact", "chat", "contract", "manifest", "runtime", "verification", "evaluate", "report"),
        *("verify", "deploy"),
    ),
    ("tuning",),  # finding schedules runs what the compiler builds; keeping and choosing them lies below it
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

PURE = {name for names in LAYERS[:2] for name in names}  # neither torch nor tvm
MAY_IMPORT_TORCH = ("awq", "models", "evaluate")


def modules() -> dict[str, Path]:
    """Dotted name below awq_compile → file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for name in ("passes", "targets"):  # links, which rglob does not follow
        for path in sorted((PACKAGE / name).glob("**/*.py")):
            parts = (name, *path.relative_to(PACKAGE / name).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]
    return found


MODULES = modules()


def rank(module: str) -> int:
    """Layer of a module, by its longest known prefix."""
    name = module
    while name not in RANK:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} is in no layer: add it to LAYERS"
    return RANK[name]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the layer"
            assert node.module is not None
            if node.module.split(".")[0] == "awq_compile":  # the imported name may itself be a module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def own_module(dotted: str) -> str | None:
    """The module of ours that an imported name belongs to, below awq_compile; None for the root package."""
    name = dotted.removeprefix("awq_compile").removeprefix(".")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_the_walk_sees_the_linked_packages() -> None:
    """The modules under passes/ and targets/ are among those checked."""
    assert {"passes", "targets.base", "cli.main", "formats"} <= MODULES.keys()


def test_every_package_is_installed() -> None:
    """pyproject.toml lists each folder that holds modules: a wheel without one would fail at the user's."""
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    packages = {f"awq_compile.{name}" for name, path in MODULES.items() if path.name == "__init__.py"}
    assert packages | {"awq_compile"} == set(listed)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """Every import of ours goes to the same layer or a lower one, and third parties stay where they belong."""
    for line, dotted in imports(MODULES[module]):
        where = f"{MODULES[module].name}:{line}: {module} imports {dotted}"
        top = dotted.split(".")[0]
        if top == "awq_compile":
            imported = own_module(dotted)
            if imported is None:
                continue
            assert rank(imported) <= rank(module), f"{where}, which lies above it"
            if module.startswith("passes") and imported.startswith("targets"):
                assert imported == "targets.base", f"{where}: passes take a TargetSpec value and know no target"
            assert not (module.startswith("awq.") and imported.startswith("targets")), where
            assert not (module.startswith("targets") and imported.startswith("awq.")), where
        if top in ("torch", "transformers"):
            assert module.split(".")[0] in MAY_IMPORT_TORCH, f"{where}: only {MAY_IMPORT_TORCH} may"
        if top in ("torch", "transformers", "tvm", "tvm_ffi"):
            assert module not in PURE, f"{where}: this layer is pure data and NumPy"
            assert not module.startswith("cli"), f"{where}: the command line calls our own modules only"
