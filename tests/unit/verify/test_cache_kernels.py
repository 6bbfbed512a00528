"""The cases of the KV cache's kernels fit kernels for every size of page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest
from tvm.relax.frontend.nn.llm import kv_cache as kernels

from awq_compile.limits import PAGE_SIZES
from awq_compile.verify.case import arrays_after, call_arguments, judge
from awq_compile.verify.cases import cache
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.roles import Cases

HEADS, DIM = 2, 16
KERNELS: dict[str, tuple[Callable[[int, Any], Any], Cases]] = {
    "append": (lambda page, _: kernels._kv_cache_transpose_append(HEADS, DIM, "float16", page), cache.append),
    "copy": (
        lambda page, target: kernels._copy_single_page(HEADS, page, DIM, "float16", target),
        cache.copy_single_page,
    ),
    "compact": (lambda page, target: kernels._compact_kv_copy(HEADS, DIM, "float16", target, page), cache.compact),
    "debug": (lambda _, __: kernels._kv_cache_debug_get_kv(2, HEADS, DIM, "float16"), cache.debug_get_kv),
}


@pytest.mark.parametrize("page", [PAGE_SIZES[0], 32, PAGE_SIZES[-1]])
@pytest.mark.parametrize("name", KERNELS)
def test_every_size_of_page(name: str, page: int) -> None:
    """As `verify` runs them; with other pages than the kernel's the launch table refuses the arguments."""
    emit, cases = KERNELS[name]
    built = hk.build(emit(page, hk.device_target("cuda")).with_attr("global_symbol", name), "cuda", "fallback")
    for case in cases(built.tables[name], np.random.default_rng(0)):
        arguments = call_arguments(built.tables[name], case)
        assert hk.run(built, SimtExecutor(), name, arguments)
        outcome = judge(case, arrays_after(arguments))
        assert not outcome.reason, f"{case.label}: {outcome.reason}"
