"""A model's kernels: which there are, how much of the time each takes, and in what order they are tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_tuning import FakeMeasurer

import awq_compile
from awq_compile.formats import QuantScheme, QuantSpec
from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config
from awq_compile.problem import MatmulProblem
from awq_compile.targets import resolve_target
from awq_compile.targets.roofs import nominal_roof
from awq_compile.tuning.cost import roofline_seconds
from awq_compile.tuning.database import ScheduleDatabase, user_files
from awq_compile.tuning.measure import Work
from awq_compile.tuning.problems import Share, model_works
from awq_compile.tuning.session import tune_works
from awq_compile.tuning.tune import Options

SPEC = resolve_target("opencl")


def test_the_demos_kernels_and_shares() -> None:
    """Written down from the configuration: four linears in each of 4 layers, and the head once, for one row of each."""
    config = read_config(Path(awq_compile.__file__).parent / "data" / "demo")
    roof = nominal_roof("cpu")
    cpu = resolve_target("cpu:aarch64-linux-gnu")
    found = model_works(config, QuantScheme.parse("w4g128"), cpu, CompileOptions(512, 256, 4), roof)
    h, f, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = config.num_layers
    expected = {(qkv, h, layers), (h, h, layers), (f, h, layers), (h, f, layers), (vocab, h, 1)}
    for bucket in ("gemv", "small", "gemm"):
        shares = [share for share in found if share.work.bucket == bucket]
        # A prefill needs the head for its last token only.
        wanted = expected - ({(vocab, h, 1)} if bucket == "gemm" else set())
        assert {(s.work.problem.n, s.work.problem.k, s.calls) for s in shares} == wanted
        assert sum(share.share for share in shares) == pytest.approx(1)
        times = [share.calls * roofline_seconds(share.work.problem, share.work.rows, roof) for share in shares]
        assert [t / sum(times) for t in times] == pytest.approx([share.share for share in shares])


def works(*shares: float) -> list[Share]:
    """Of problems of as many sizes."""
    problem = MatmulProblem(64, 128, QuantSpec(4, 32), dtype="float16")
    return [Share(Work(replace(problem, n=64 * (i + 1)), "gemv", 1), 1, share) for i, share in enumerate(shares)]


def test_the_largest_share_comes_first_and_is_kept_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop after the first kernel leaves its record."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path))
    measurer = FakeMeasurer(lambda schedule: 1e-4 / schedule.rows)
    shares = works(0.2, 0.7, 0.1)
    session = tune_works(measurer, shares, SPEC, measurer.roof(), Options(trials=3))
    share, outcome = next(session)
    assert share == shares[1]
    assert [r.line() for r in ScheduleDatabase.load(user_files()).records] == [outcome.record.line()]
    assert [share.share for share, _ in session] == [0.2, 0.1]
    assert len(user_files()) == 1 and len(ScheduleDatabase.load(user_files()).records) == 3


def test_seconds_go_by_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel may take is its share of what is left, and no less than a few seconds."""
    monkeypatch.setenv("AWQ_COMPILE_CACHE", str(tmp_path))
    limits: list[float] = []

    def spy(measurer: object, work: object, spec: object, roof: object, options: Options, *rest: object) -> object:
        limits.append(options.seconds)
        return tune_work(measurer, work, spec, roof, options, *rest)  # type: ignore[arg-type]

    from awq_compile.tuning import session
    from awq_compile.tuning.tune import tune_work

    monkeypatch.setattr(session, "tune_work", spy)
    measurer = FakeMeasurer(lambda schedule: 1e-4 / schedule.rows)
    for _ in tune_works(measurer, works(0.5, 0.4, 0.1), SPEC, measurer.roof(), Options(trials=2), seconds=1000):
        pass
    assert limits[0] == pytest.approx(500, abs=20)
    assert limits[1] == pytest.approx(800, abs=40)  # the first ended at once: four fifths of the rest
    assert limits[2] == pytest.approx(1000, abs=40)
    limits.clear()
    for _ in tune_works(measurer, works(0.999, 0.001), SPEC, measurer.roof(), Options(trials=2)):
        pass
    assert limits == [math.inf, math.inf]
