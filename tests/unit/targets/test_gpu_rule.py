"""The untuned schedules of GPUs that follow from K and the format."""

from __future__ import annotations

import pytest

from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import SimtGemvSchedule
from awq_compile.targets import resolve_target


@pytest.mark.parametrize("target", ["vulkan:nvidia", "vulkan", "metal", "opencl", "android:mali", "cuda:sm_75"])
@pytest.mark.parametrize("k", [64, 128, 896, 4096])
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 64), Float16Spec()], ids=lambda s: s.name)
def test_half_the_threads_along_k_have_work(target: str, k: int, spec: QuantSpec | Float16Spec) -> None:
    """And a block has as many threads as for a K that occupies all."""
    rule = resolve_target(target).rule
    wide, found = (rule(MatmulProblem(512, n, spec, dtype="float16")).gemv for n in (1 << 14, k))
    assert isinstance(found, SimtGemvSchedule)
    assert found.k_threads * found.unit < 2 * k
    assert found.threads == wide.threads


def test_nvidias_float16_weights_are_read_side_by_side() -> None:
    """16 bytes a thread, for two rows, as measured; INT4 has eight rows share x."""
    rule = resolve_target("vulkan:nvidia").rule
    heads = rule(MatmulProblem(512, 4096, Float16Spec(), dtype="float16"))
    int4 = rule(MatmulProblem(512, 4096, QuantSpec(4, 128), dtype="float16"))
    assert heads.gemv == SimtGemvSchedule(32, 4, 2, 8)
    assert heads.small == SimtGemvSchedule(32, 4, 2, 8, 4)
    assert int4.gemv == SimtGemvSchedule(64, 2, 8, 32)
    assert int4.gemv.in_place and not heads.small.in_place
