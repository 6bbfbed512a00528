"""The signatures that the contract asks for, and those that are read from a library, are written down."""

from __future__ import annotations

import os
from pathlib import Path

from awq_compile.contract.functions import Sizes, demands
from awq_compile.contract.library import read_library

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = Sizes(hidden_size=64, vocab_size=4096, prefill_chunk_size=64, num_params=12, dtype="float16")


def check_golden(name: str, lines: list[str]) -> None:
    """tests/golden/NAME.txt; `UPDATE_GOLDEN=1` rewrites it."""
    path, text = GOLDEN / f"{name}.txt", "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; look at the change, then UPDATE_GOLDEN=1"


def test_what_the_engine_asks_for() -> None:
    """Of a device that samples: there it asks for most. Compared by eye with mlc-llm's sources."""
    asked = {device: list(demands(TINY, device)) for device in ("vulkan", "opencl")}
    check_golden("contract_demands", [f"{d.name}{d.signature}" for d in asked["vulkan"]])
    assert asked["vulkan"][: len(asked["opencl"])] == asked["opencl"]
    assert len(asked["vulkan"]) == len(asked["opencl"]) + 6


def test_what_a_library_has(built: Path) -> None:
    """Every function that the engine looks up, with the sizes that the code itself names."""
    library = read_library(built / "lib/tiny-w4g32-android.tar", "opencl")
    names = [demand.name for demand in demands(TINY, "opencl")]
    check_golden("contract_signatures", [f"{name}{library.signature(name)}" for name in names])
