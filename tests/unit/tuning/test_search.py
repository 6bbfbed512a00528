"""A search measures no schedule twice, not after a kill either, and keeps the untuned one unless it is beaten."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_tuning import FakeMeasurer

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import GemvSchedule, SimtGemvSchedule
from awq_compile.targets import resolve_target
from awq_compile.targets.roofs import nominal_roof
from awq_compile.tuning.database import ScheduleDatabase
from awq_compile.tuning.measure import SEARCH, Measurement, Times, Work
from awq_compile.tuning.search import FROM_MODEL, Search
from awq_compile.tuning.space import space_of
from awq_compile.tuning.tune import Options, Outcome, choose, search_plan, tune_work

SPEC = resolve_target("opencl")
PROBLEM = MatmulProblem(512, 256, QuantSpec(4, 32), dtype="float16")
WORK = Work(PROBLEM, "gemv", 1)
RULE = SPEC.rule(PROBLEM).gemv
BEST = SimtGemvSchedule(2, 32, 8, 16)


def hill(schedule: Any) -> float:
    """Microseconds: smooth in the fields, least at `BEST`."""
    away = sum(
        abs(math.log2(getattr(schedule, name) / getattr(BEST, name)))
        for name in ("k_threads", "row_groups", "rows", "unit")
    )
    return (10 + away + schedule.magic) * 1e-6


def tune(measurer: FakeMeasurer, folder: Path, database: ScheduleDatabase | None = None, **options: Any) -> Outcome:
    found = Options(**{"trials": 40, "patience": 100} | options)
    roof = nominal_roof("opencl")
    return tune_work(measurer, WORK, SPEC, roof, found, folder, database or ScheduleDatabase())


def test_it_finds_the_best_of_a_hill_in_a_few_trials(tmp_path: Path) -> None:
    """A fifth of the space suffices, the untuned schedule comes first, and none is measured twice."""
    measurer = FakeMeasurer(hill)
    outcome = tune(measurer, tmp_path)
    assert measurer.measured[0] == RULE
    assert len(set(measurer.measured)) == len(measurer.measured) == 40
    assert len(space_of(PROBLEM, "gemv", SPEC).members) > 150
    assert outcome.record.schedule == BEST and outcome.speedup > 1
    assert outcome.record.runner_up_seconds is not None and outcome.record.runner_up_seconds > outcome.record.seconds


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    """The same seed measures the same schedules in the same order, another one others."""
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        measurer = FakeMeasurer(hill)
        tune(measurer, tmp_path / name, seed=seed)
        runs.append(measurer.measured)
    assert runs[0] == runs[1]
    assert runs[0][: FROM_MODEL + 1] == runs[2][: FROM_MODEL + 1] and runs[0] != runs[2]


class Killed(BaseException):
    """Ends a search as a signal does."""


@pytest.mark.parametrize("kills", [(1, 2, 9), (13, 20, 39)])
def test_a_killed_search_goes_on_without_repeating(tmp_path: Path, kills: tuple[int, ...]) -> None:
    """Killed in the middle of the n-th measurements, it goes on behind them: the candidate that was begun is left."""
    measured: list[Any] = []

    def seconds(schedule: Any) -> float:
        measured.append(schedule)
        if len(measured) in kills:
            raise Killed
        return hill(schedule)

    for _ in kills:
        with pytest.raises(Killed):
            tune(FakeMeasurer(seconds), tmp_path)
    outcome = tune(FakeMeasurer(seconds), tmp_path)
    finals = 4  # the untuned schedule and three finalists, compared at the end
    assert len(set(measured[:-finals])) == len(measured[:-finals]) == 40 + len(kills)
    assert outcome.measured + outcome.recalled == 40 and outcome.recalled > 0
    again = FakeMeasurer(hill)
    assert tune(again, tmp_path).measured == 0 and not again.measured


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    """A kill while a line is written leaves its beginning; all before it counts."""
    tune(FakeMeasurer(hill), tmp_path, trials=5)
    (log,) = tmp_path.iterdir()
    with log.open("a") as file:
        file.write('{"schedule": {"templ')
    again = FakeMeasurer(hill)
    assert tune(again, tmp_path, trials=7).recalled == 5
    assert len(again.measured) == 2
    text = log.read_text()
    log.write_text(text[:40] + "x" + text[40:])
    with pytest.raises(CompileError, match="damaged"):
        tune(again, tmp_path)


def test_what_changes_a_measurement_starts_another_log(tmp_path: Path) -> None:
    """Another seed or another device do not go on with this one's trials."""
    tune(FakeMeasurer(hill), tmp_path, trials=5)
    assert tune(FakeMeasurer(hill), tmp_path, trials=5, seed=1).recalled == 0
    assert tune(FakeMeasurer(hill, kind="cpu"), tmp_path, trials=5).recalled == 0


def test_bad_candidates_are_counted_and_never_chosen(tmp_path: Path) -> None:
    """Three of four crash, among them the best."""
    outcome = tune(FakeMeasurer(lambda s: math.inf if s == BEST or s.rows != RULE.rows else hill(s)), tmp_path)
    assert outcome.lost["crashed"] > 5
    assert outcome.record.schedule.rows == RULE.rows  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="no schedule gives the right result"):
        tune(FakeMeasurer(lambda _: math.inf), tmp_path / "all")


def test_the_untuned_schedule_stays_unless_it_is_beaten_beyond_noise(tmp_path: Path) -> None:
    """One and a half per cent are not enough; three are."""
    for gain, kept in ((0.015, True), (0.03, False)):
        untuned = hill(BEST) / (1 - gain)
        found = tune(FakeMeasurer(lambda s, t=untuned: t if s == RULE else hill(s)), tmp_path / str(gain))  # type: ignore[misc]
        assert (found.record.schedule == RULE) is kept
        assert found.record.seconds <= found.record.untuned_seconds


def times(schedule: Any, cold: float, warm: float) -> Measurement:
    return Measurement(schedule, "ok", Times.of([cold] * 9), Times.of([warm] * 9))


def test_among_equals_the_least_code_is_chosen() -> None:
    """One per cent faster is noise, and not worth four times the code; three per cent are worth it."""
    untuned, short = times(GemvSchedule(16, 4), 2.0, 2.0), times(GemvSchedule(16, 2), 1.0, 1.0)
    for seconds, chosen in ((0.99, 2), (0.97, 8)):
        long = times(GemvSchedule(16, 8), seconds, 1.0)
        assert choose(untuned, [untuned, short, long]).schedule == GemvSchedule(16, chosen)


def test_a_schedule_that_is_slower_out_of_the_cache_is_not_chosen() -> None:
    """However fast it is over weights in memory; one run out of the cache says nothing."""
    untuned, other = times(GemvSchedule(16, 4), 2.0, 1.0), times(GemvSchedule(16, 2), 1.0, 1.1)
    assert choose(untuned, [untuned, other]) is untuned
    once = replace(other, warm=Times.of([1.1]))
    assert choose(untuned, [untuned, once]) is once


def test_a_hopeless_candidate_is_measured_once() -> None:
    """At half the speed of the fastest; runs of microseconds are all measured alike."""
    search = Search(space_of(PROBLEM, "gemv", SPEC), [RULE], [RULE], seed=0)
    assert search_plan(search, SEARCH) == SEARCH
    search.take(times(RULE, 0.1, 0.1))
    assert search_plan(search, SEARCH).slow == pytest.approx(0.2)
    search.take(times(BEST, 1e-5, 1e-5))
    assert search_plan(search, SEARCH).slow == pytest.approx(0.01)


def test_neighbours_come_right_after_the_untuned_schedule(tmp_path: Path) -> None:
    """A record of a similar problem on the same limits is measured second."""
    near = tune(FakeMeasurer(hill), tmp_path).record
    other = MatmulProblem(1024, 256, QuantSpec(4, 32), dtype="float16")
    measurer = FakeMeasurer(hill)
    database = ScheduleDatabase((near,))
    roof = nominal_roof("opencl")
    tune_work(measurer, Work(other, "gemv", 1), SPEC, roof, Options(trials=3), tmp_path, database)
    assert measurer.measured[1] == near.schedule


def test_it_stops_early(tmp_path: Path) -> None:
    """After `patience` results that are not better than the first."""
    measurer = FakeMeasurer(lambda s: 1e-6 if s == RULE else 2e-6)
    tune(measurer, tmp_path, patience=6)
    assert len(measurer.measured) == 7


def test_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    """Every member once, and no more."""
    problem = MatmulProblem(64, 64, QuantSpec(3, 32), dtype="float16")  # units of 32 codes only
    measurer = FakeMeasurer(hill)
    options = Options(trials=10_000, patience=10_000)
    tune_work(measurer, Work(problem, "gemv", 1), SPEC, nominal_roof("opencl"), options, tmp_path, ScheduleDatabase())
    members = space_of(problem, "gemv", SPEC).members
    assert sorted(map(str, measurer.measured[1:])) == sorted(map(str, set(members) - {measurer.measured[0]}))


def test_proposals_are_legal_members() -> None:
    """Whatever the estimator proposes."""
    space = space_of(PROBLEM, "gemv", SPEC)
    search = Search(space, [RULE], space.members, seed=3)
    assert set(search.propose(60)) <= set(space.members)
