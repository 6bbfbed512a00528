"""Tunes the kernels of a model one after the other, largest share of the time first, and keeps each as it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from awq_compile import settings
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.database import add_records, device_file, known_records, user_folder
from awq_compile.tuning.measure import Measurement, Measurer
from awq_compile.tuning.problems import Share
from awq_compile.tuning.search import Search
from awq_compile.tuning.tune import Options, Outcome, tune_work

_LEAST_SECONDS = 5.0  # of a kernel, however small its share


def trials_folder() -> Path:
    """Where the logs of searches are kept, from which a killed tuning goes on."""
    return settings.cache_folder("tuning")


def tune_works(
    measurer: Measurer,
    shares: Sequence[Share],
    spec: TargetSpec,
    roof: Roof,
    options: Options,
    seconds: float = math.inf,
    on_trial: Callable[[Share, Search, Measurement], None] = lambda _share, _search, _measurement: None,
) -> Iterator[tuple[Share, Outcome]]:
    """Tunes every work; its record is in the user's database when it is yielded.

    With `seconds` for all of them, a work gets time by its share, and what an early end leaves goes to those behind.
    """
    end = time.monotonic() + seconds
    order = sorted(shares, key=lambda share: -share.share)
    for i, share in enumerate(order):
        limit = options.seconds
        if math.isfinite(seconds):
            left, weight = end - time.monotonic(), share.share / sum(s.share for s in order[i:])
            limit = min(limit, max(_LEAST_SECONDS, left * weight))

        def told(search: Search, measurement: Measurement, share: Share = share) -> None:
            on_trial(share, search, measurement)

        database = known_records()  # those before this one are its neighbours
        limited = replace(options, seconds=limit)
        outcome = tune_work(measurer, share.work, spec, roof, limited, trials_folder(), database, told)
        add_records(device_file(user_folder(), outcome.record), [outcome.record])
        yield share, outcome
