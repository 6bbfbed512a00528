"""The search for the fastest member of a space: what to measure next, by Optuna, never the same twice.

It begins with the untuned schedule, those of similar problems, and the first of the analytical ranking that differ
from each other; from then on Optuna's tree-structured Parzen estimator proposes values of the fields, as numbers of
their places in `Space.choices`. A proposal that is illegal or was measured stands for the nearest that is neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final

from awq_compile.errors import EnvironmentMissingError
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.measure import Measurement
from awq_compile.tuning.space import Space
from awq_compile.tuning.templates import Schedule

FROM_MODEL: Final = 12  # of the analytical ranking
_DIFFERENT: Final = 2  # fields in which those differ

Places = tuple[int, ...]


class Search:
    """`first` are measured before anything is proposed; `ranking` is all of the space, best estimate first."""

    def __init__(self, space: Space, first: Sequence[Schedule], ranking: Sequence[Schedule], seed: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise EnvironmentMissingError(
                "the Python package 'optuna' is missing, which searches for schedules",
                hint="pip install awq-compile[tune]",
            ) from None
        self.optuna: Any = optuna
        self.space = space
        self.seed = seed
        self.ranking = list(ranking)
        self.first = list(dict.fromkeys([*first, *different(space, ranking)]))
        self.results: dict[Candidate, Measurement] = {}
        self._taken: set[Candidate] = set()
        self._asked: dict[Candidate, Any] = {}

    def recall(self, found: Sequence[Measurement], begun: Sequence[Candidate]) -> None:
        """Takes what an earlier run of the same search measured, and what it was killed over."""
        self._taken.update(begun)
        for measurement in found:
            self._taken.add(measurement.schedule)
            self.take(measurement)

    def propose(self, count: int) -> list[Schedule]:
        """Up to `count` schedules to measure; fewer when the space is exhausted."""
        proposed: list[Schedule] = []
        while len(proposed) < count and (schedule := self._next()) is not None:
            self._taken.add(schedule)
            proposed.append(schedule)
        return proposed

    def take(self, measurement: Measurement) -> None:
        """Learns from a result. Candidates without a time count as the worst."""
        schedule = measurement.schedule
        self.results[schedule] = measurement
        states = self.optuna.trial.TrialState
        state, value = states.PRUNED, None
        if measurement.status == "ok":
            state, value = states.COMPLETE, math.log(measurement.seconds)
        if (trial := self._asked.pop(schedule, None)) is not None:
            self._study.tell(trial, value, state)
        elif (places := self._places.get(schedule)) is not None:
            params = dict(zip(self.space.choices, places, strict=True))
            make = self.optuna.trial.create_trial
            self._study.add_trial(make(state=state, value=value, params=params, distributions=self._distributions))

    def best(self) -> list[Measurement]:
        """Of those that are right, the fastest first."""
        return sorted((m for m in self.results.values() if m.status == "ok"), key=lambda m: m.seconds)

    def stale(self) -> int:
        """How many results have come since the best one was beaten by more than a hundredth."""
        best, since = math.inf, 0
        for measurement in self.results.values():
            since += 1
            if measurement.seconds < best * 0.99:
                best, since = measurement.seconds, 0
        return since

    def _next(self) -> Schedule | None:
        for schedule in self.first:
            if schedule not in self._taken:
                return schedule
        if all(schedule in self._taken for schedule in self.ranking):
            return None
        trial = self._study.ask(self._distributions)
        wanted = tuple(trial.params[name] for name in self.space.choices)
        schedule = self._nearest_free(wanted)
        if self._places[schedule] == wanted:
            self._asked[schedule] = trial
        else:
            self._study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return schedule

    def _nearest_free(self, wanted: Places) -> Schedule:
        """The free member fewest places away; among equals the one that ranks first."""
        free = (s for s in self.ranking if s not in self._taken)
        return min(free, key=lambda s: sum(abs(a - b) for a, b in zip(self._places[s], wanted, strict=True)))

    @cached_property
    def _places(self) -> dict[Candidate, Places]:
        return {schedule: places_of(self.space, schedule) for schedule in self.space.members}

    @cached_property
    def _distributions(self) -> dict[str, Any]:
        kind = self.optuna.distributions.IntDistribution
        return {name: kind(0, len(values) - 1) for name, values in self.space.choices.items()}

    @cached_property
    def _study(self) -> Any:
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        # A search that goes on has other random numbers than one that begins: both are determined by their seeds.
        seed = self.seed + 1_000_003 * len(self.results)
        sampler = self.optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=FROM_MODEL)
        return self.optuna.create_study(sampler=sampler)


def places_of(space: Space, schedule: Schedule) -> Places:
    """Where the fields' values stand in `space.choices`."""
    return tuple(values.index(getattr(schedule, name)) for name, values in space.choices.items())


def different(space: Space, ranking: Sequence[Schedule], count: int = FROM_MODEL) -> Iterator[Schedule]:
    """The first `count` of a ranking, each different from those before it in at least two fields that vary."""
    kept: list[Places] = []
    varying = sum(len(values) > 1 for values in space.choices.values())
    for schedule in ranking:
        places = places_of(space, schedule)
        least = min(_DIFFERENT, max(1, varying - 1))
        if all(sum(a != b for a, b in zip(places, other, strict=True)) >= least for other in kept):
            kept.append(places)
            yield schedule
        if len(kept) == count:
            return
