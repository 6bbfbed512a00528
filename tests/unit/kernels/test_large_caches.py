"""A layer's cache may have more than 2^31 elements: attention on GPUs finds pages by indices of 64 bits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest

from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.gpu_attention import paged_decode
from awq_compile.kernels.mma_attention import paged_prefill
from awq_compile.targets import resolve_target
from awq_compile.targets.gpu import GpuTarget
from awq_compile.verify.case import Case, arrays_after, call_arguments, judge
from awq_compile.verify.cases import attention
from awq_compile.verify.executors.simt import SimtExecutor

SHAPE = AttentionShape(4, 2, 64, "float16")
ELEMENTS = 2 * SHAPE.kv_heads * SHAPE.page * SHAPE.head_dim  # of a page
FAR = (1 << 31) // ELEMENTS  # the first page whose elements 32 bits with a sign do not count


def far_away(built: hk.Built) -> hk.Built:
    """The same kernel for pages from number `FAR` on, of which it is given the first."""
    text, count = re.subn(r"\bpages_ptr\b[^;{}]*\) \{", rf"\g<0> pages_ptr -= {FAR}LL * {ELEMENTS};", built.code.code)
    assert count == 1
    return replace(built, code=replace(built.code, code=text))


def check(name: str, function: Any, make: Any) -> None:
    """Page numbers raised by `FAR` lead to the same memory."""
    built = far_away(hk.build(function, "cuda"))
    table = built.tables[name]
    case: Case = make(attention._Kernel.of(table, np.random.default_rng(8), None))
    at = next(i for i, param in enumerate(table["params"]) if param["name"] == "page_values")
    pages = np.asarray(case.arguments[at])
    case = replace(case, arguments=[*case.arguments[:at], pages + np.int32(FAR), *case.arguments[at + 1 :]])
    arguments = call_arguments(table, case)
    hk.run(built, SimtExecutor(), name, arguments)
    assert not judge(case, arrays_after(arguments)).reason


@pytest.mark.parametrize("name", ["cuda:sm_80", "metal"])
def test_decode(name: str) -> None:
    """With each kind of schedule, as CUDA."""
    target = resolve_target(name)
    assert isinstance(target, GpuTarget)
    function = paged_decode(SHAPE, target.decode_attention, "attention_paged_decode")
    check("attention_paged_decode", function, lambda kernel: attention._decode(kernel, (100, 7), False))


def test_prefill() -> None:
    """Of tiles of keys, the first and those that are brought ahead."""
    function = paged_prefill(SHAPE, "attention_paged_prefill")
    check("attention_paged_prefill", function, lambda k: attention._prefill(k, (20, 3), (150, 7), causal=True))
