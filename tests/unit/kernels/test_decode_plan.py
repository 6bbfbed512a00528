"""What decode attention takes from TVM's runtime, as its emitted host code computes it."""

from __future__ import annotations

from typing import Any

import helpers_kernels as hk
import pytest

from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.decode_plan import DecodePlan
from awq_compile.kernels.gpu_attention import paged_decode
from awq_compile.schedules import DecodeAttentionSchedule
from awq_compile.targets import resolve_target
from awq_compile.targets.gpu import GpuTarget
from awq_compile.verify.expressions import evaluate

NAME = "attention_paged_decode"


def schedule_of(target: str) -> DecodeAttentionSchedule:
    spec = resolve_target(target)
    assert isinstance(spec, GpuTarget)
    return spec.decode_attention


def taken(table: dict[str, Any], sequences: int, pages: int) -> int:
    """Bytes of the one workspace."""
    scalars: dict[str, int | float] = {"b": sequences, "nnz_pages": pages}
    for kind, name, value, *rest in table["body"]:
        if kind == "alloc":
            assert value == "float32"
            (size,) = rest[0]
            return 4 * int(evaluate(size, scalars))
        assert kind == "let"
        scalars[name] = evaluate(value, scalars)
    raise AssertionError("no workspace")


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("cuda:sm_90", AttentionShape(32, 8, 128, "float16")),
        ("cuda:sm_90", AttentionShape(32, 1, 64, "float16", page=128)),
        ("opencl", AttentionShape(14, 2, 64, "float16", page=8)),
    ],
    ids=str,
)
def test_the_most_is_what_the_kernel_takes_at_most(target: str, shape: AttentionShape) -> None:
    """Over all lengths of the page table: few pages, about as many as blocks, and far more than chunks grow with."""
    plan = DecodePlan.of(shape, schedule_of(target))
    table = hk.build(paged_decode(shape, plan.schedule, NAME), target.partition(":")[0]).tables[NAME]
    for sequences, pages in ((1, 5), (8, 1000), (300, 9000)):
        most = max(taken(table, sequences, used) for used in range(pages + 1))
        assert most == plan.workspace_bytes(sequences, pages)
