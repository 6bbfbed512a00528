"""Spaces hold exactly the legal schedules: each member is checked against limits written down here again."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from awq_compile.errors import CompileError
from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import GemvSchedule, MatrixGemvSchedule, SimtGemmSchedule, WarpgroupSchedule
from awq_compile.targets import resolve_target
from awq_compile.targets.gpu import GpuTarget, decode_attention
from awq_compile.targets.roofs import nominal_roof
from awq_compile.tuning.cost import estimate, ranked, roofline_seconds
from awq_compile.tuning.database import known_records
from awq_compile.tuning.measure import rows_of
from awq_compile.tuning.space import Space, space_of, why_illegal
from awq_compile.tuning.templates import (
    TEMPLATES,
    VERSIONS,
    decode_schedule,
    encode_schedule,
    fits_bucket,
    template_of,
)

NAMES = (
    "cpu:aarch64-linux-gnu",
    "cpu:x86_64-linux-gnu@znver4",
    "opencl",
    "android:mali",
    "vulkan",
    "metal",
    "cuda:sm_75",
    "cuda:sm_80",
    "cuda:sm_90",
)


def problem(target: str, spec: WeightSpec | None = None, activation: str = "silu_mul") -> MatmulProblem:
    found = spec or QuantSpec(4, 128)
    return MatmulProblem(1408, 1024, found, Epilogue(activation=activation), resolve_target(target).dtype)


def buckets_of(*targets: str) -> list[tuple[str, str]]:
    """(target, bucket) of all kernels."""
    return [(t, bucket) for t in targets for bucket in resolve_target(t).rule(problem(t)).by_bucket]


def test_kernels_of_buckets() -> None:
    """Every target has those of one, few and many rows; where W is decoded in registers, of those between as well."""
    for between in ("pair", "quad", "medium", "broad", "large", "wide"):
        assert {t for t, bucket in buckets_of(*NAMES) if bucket == between} == {"cuda:sm_80", "cuda:sm_90"}
    assert set(buckets_of(*NAMES)) >= {(t, b) for t in NAMES for b in ("gemv", "small", "gemm")}
    with pytest.raises(CompileError, match="medium has no kernel of its own"):
        space_of(problem("opencl"), "medium", resolve_target("opencl"))


def test_schedules_for_tensor_cores_that_are_refused() -> None:
    """Each for its own reason, and its neighbour is legal."""
    spec = resolve_target("cuda:sm_90")
    int4 = MatmulProblem(4096, 1024, QuantSpec(4, 128), dtype="float16")
    float16 = replace(int4, spec=Float16Spec())
    for p, bucket, refused, reason, legal in (
        (int4, "wide", WarpgroupSchedule(2, 1, 32), "256 rows of x a block", WarpgroupSchedule(2, 1, 16)),
        (
            int4,
            "large",
            WarpgroupSchedule(1, 1, 8, 4, ahead=4),
            "a slice has 2",
            WarpgroupSchedule(1, 1, 8, 4, ahead=2),
        ),
        (int4, "pair", MatrixGemvSchedule(16), "16 warps for 8 groups", MatrixGemvSchedule(8)),
        (int4, "quad", MatrixGemvSchedule(4, columns=2), "16 rows of x for at most 8", MatrixGemvSchedule(4)),
        (float16, "gemv", MatrixGemvSchedule(32), "32 warps for 16 groups", MatrixGemvSchedule(16)),
        (float16, "small", MatrixGemvSchedule(4, stages=2), "wait in registers", MatrixGemvSchedule(4)),
        (float16, "gemm", WarpgroupSchedule(2, 1, 16), "does not read f16", spec.rule(float16).gemm),
    ):
        assert reason in (why_illegal(p, bucket, spec, refused) or ""), (bucket, refused)
        assert not why_illegal(p, bucket, spec, legal), (bucket, legal)


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_86", "cuda:sm_90", "cuda:sm_90+sm_100", "cuda:sm_120"])
def test_untuned_schedules_are_legal(target: str) -> None:
    """For odd numbers of groups, zero points and gates as well."""
    spec = resolve_target(target)
    for n, k, symmetric, activation in itertools.product(
        (64, 4096, 6144, 8192, 11008, 14336, 28672, 57344),
        (128, 384, 896, 4096, 11008),
        (True, False),
        ("none", "silu_mul"),
    ):
        for kind in (QuantSpec(4, 128, symmetric), Float16Spec()):
            p = MatmulProblem(n, k, kind, Epilogue(activation=activation), "float16")
            for bucket, schedule in spec.rule(p).by_bucket.items():
                assert not why_illegal(p, bucket, spec, schedule), (p.name, bucket, schedule)


def test_wgmma_is_for_sm_90_alone() -> None:
    """Whatever was measured on one: a library for other architectures as well has no such kernel."""
    for name in ("cuda:sm_90+sm_100", "cuda:sm_80+sm_90"):
        spec, p = (
            resolve_target(name),
            MatmulProblem(4096, 14336, QuantSpec(4, 128), Epilogue(residual=True), "float16"),
        )
        reason = why_illegal(p, "gemm", spec, WarpgroupSchedule(2, 1, 32))
        assert reason is not None and "no wgmma" in reason
        chosen, _ = known_records().choose_linear(spec, p)
        assert not any(isinstance(s, WarpgroupSchedule) for s in chosen.by_bucket.values())


@pytest.mark.parametrize(("target", "bucket"), buckets_of(*NAMES))
def test_members_are_the_legal_combinations(target: str, bucket: str) -> None:
    """Brute force over all values: what is left out is illegal, what is in fits threads and memory of the target."""
    spec, p = resolve_target(target), problem(target)
    space = space_of(p, bucket, spec)
    members = set(space.members)
    least = 4 if space.template in ("matrix_gemv", "staged_matrix", "warpgroup") else 30
    assert len(members) == len(space.members) >= least
    assert spec.rule(p).of(bucket) in members
    assert space.members == space_of(p, bucket, spec).members
    for values in itertools.product(*space.choices.values()):
        try:
            schedule = TEMPLATES[space.template](**dict(zip(space.choices, values, strict=True)))
        except CompileError:
            continue
        assert (schedule in members) == (why_illegal(p, bucket, spec, schedule) is None)
    if isinstance(spec, GpuTarget):
        most = 227 << 10 if space.template == "warpgroup" else spec.limits.shared_bytes  # it opts in at the launch
        for member in space.members:
            assert 32 <= member.threads <= spec.limits.max_threads  # type: ignore[union-attr]
            assert member.shared_bytes <= most  # type: ignore[union-attr]
    if bucket == "gemv":
        assert {getattr(member, "batch", 1) for member in members} == {1}


def small_gpu(**limits: Any) -> GpuTarget:
    spec = resolve_target("opencl")
    assert isinstance(spec, GpuTarget)
    smaller = replace(spec.limits, **limits)
    return replace(spec, limits=smaller, decode_attention=decode_attention(smaller))


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({"max_threads": 64}, "threads in a block"),
        ({"shared_bytes": 1 << 14}, "bytes of shared memory"),
        ({"registers": 32}, "registers of a thread"),
        ({"arguments": 3}, "arguments"),
    ],
)
def test_each_limit_of_a_device_filters(limits: dict[str, int], word: str) -> None:
    """A schedule that fits the preset and not the smaller device is named with the limit that it breaks."""
    schedule = SimtGemmSchedule(64, 128, 64, 8, 8, 8, "float16")
    p = problem("opencl")
    assert why_illegal(p, "gemm", resolve_target("opencl"), schedule) is None
    assert word in (why_illegal(p, "gemm", small_gpu(**limits), schedule) or "")


def test_a_problem_that_fits_nothing_is_an_error() -> None:
    """The reason is the limit that the untuned schedule breaks."""
    with pytest.raises(CompileError, match=r"no schedule fits opencl: .* arguments"):
        space_of(problem("opencl"), "gemv", small_gpu(arguments=2))


@pytest.mark.parametrize(
    ("bucket", "target", "reason"),
    [("gemm", "cpu:aarch64-linux-gnu", "bucket"), ("gemv", "opencl", "for CPUs")],
)
def test_templates_stay_with_their_bucket_and_device(bucket: str, target: str, reason: str) -> None:
    """A record of a GEMV never becomes a GEMM, nor a CPU's schedule a GPU's."""
    assert reason in (why_illegal(problem(target), bucket, resolve_target(target), GemvSchedule(4, 2)) or "")


@pytest.mark.parametrize("spec", [Float16Spec(), QuantSpec(3, 64), QuantSpec(4, 32, order="KN")])
def test_formats_restrict_units(spec: WeightSpec) -> None:
    """3-bit codes come in units of 32, float16 weights in at most 16, and KN has a template of its own."""
    members = space_of(problem("opencl", spec), "small", resolve_target("opencl")).members
    units = {member.unit for member in members}  # type: ignore[union-attr]
    assert units == {"w3g64": {32}, "f16": {8, 16}, "w4g32kn": {8, 16, 32}}[spec.name]
    assert {template_of(member) for member in members} == {"column_gemv" if "kn" in spec.name else "simt_gemv"}


def test_schedules_survive_json() -> None:
    """Every template's round trip, and its version and buckets are known."""
    for target in NAMES:
        for bucket, schedule in resolve_target(target).rule(problem(target)).by_bucket.items():
            assert decode_schedule(encode_schedule(schedule)) == schedule
            assert fits_bucket(template_of(schedule), bucket)
    assert VERSIONS.keys() == TEMPLATES.keys()


@pytest.mark.parametrize(
    "change",
    [{"template": "x"}, {"lanes": "16"}, {"lanes": True}, {"lanes": 7}, {"rows": 1 << 20}, {"size": 1}, {"rows": None}],
)
def test_damaged_schedules_are_refused(change: dict[str, object]) -> None:
    """Unknown names, wrong types, values out of range, and a field that is missing."""
    data = encode_schedule(GemvSchedule(4, 2)) | change
    with pytest.raises(CompileError):
        decode_schedule({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize(
    ("target", "bucket"), buckets_of("cpu:aarch64-linux-gnu", "opencl", "cuda:sm_80", "cuda:sm_90", "metal")
)
def test_no_estimate_beats_the_roofline(target: str, bucket: str) -> None:
    """The ranking is total and stable, and its times are times."""
    spec, p, roof = resolve_target(target), problem(target), nominal_roof(target)
    rows = rows_of(bucket, spec.rule(p))
    space: Space = space_of(p, bucket, spec)
    order = ranked(p, rows, spec, space.members, roof)
    assert set(order) == set(space.members)
    times = [estimate(p, rows, spec, schedule, roof) for schedule in order]
    assert times == sorted(times)
    assert times[0] >= roofline_seconds(p, rows, roof) * 0.99


def test_the_model_knows_what_it_is_for() -> None:
    """Idle lanes, scattered reads and few threads cost; the worst of each kind ranks behind the untuned schedule."""
    target = "opencl"
    spec, p, roof = resolve_target(target), problem(target), nominal_roof(target)
    rule = spec.rule(p).gemv
    narrow = replace(rule, k_threads=1, row_groups=32)  # type: ignore[call-arg]
    assert estimate(p, 1, spec, narrow, roof) > estimate(p, 1, spec, rule, roof)
    cpu = resolve_target("cpu:x86_64-linux-gnu@znver4")
    wide = cpu.rule(p).gemv
    assert estimate(p, 1, cpu, replace(wide, lanes=1), nominal_roof("cpu")) > estimate(  # type: ignore[call-arg]
        p, 1, cpu, wide, nominal_roof("cpu")
    )
