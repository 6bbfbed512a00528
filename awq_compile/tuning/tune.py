"""Tunes one kernel: searches, measures the finalists again in turns with the untuned schedule, makes the record."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from awq_compile.errors import CompileError
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.cost import code_size, ranked, roofline_seconds
from awq_compile.tuning.database import ScheduleDatabase, preset_restriction, refit
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.measure import FINAL, SEARCH, Measurement, Measurer, Plan, Work
from awq_compile.tuning.record import Record, tvm_version
from awq_compile.tuning.search import Search
from awq_compile.tuning.space import Space, space_of, why_illegal
from awq_compile.tuning.templates import VERSIONS, Schedule, template_of
from awq_compile.tuning.trials import TrialLog

FINALISTS: Final = 3
NOISE: Final = 0.02  # by which a schedule must beat the untuned one at least
_HOPELESS: Final = 2.0  # times the fastest: measured once more, and no oftener
_HOPELESS_SECONDS: Final = 0.01  # of a run at least, for the first run of a short kernel says little
_FEWEST: Final = 5  # warm runs that say something
_PROXY_SECONDS: Final = 0.05  # a run of a kernel that is searched for on fewer outputs
_PROXY_OUTPUTS: Final = 256


@dataclass(frozen=True)
class Options:
    """`trials` of a kernel at most; `patience`: how many without a better one end a search; `seconds` likewise.

    `beside` are measured in turns with the finalists, and never chosen.
    """

    trials: int = 64
    patience: int = 24
    seconds: float = math.inf
    seed: int = 0
    beside: tuple[Candidate, ...] = ()
    search: Plan = SEARCH
    final: Plan = FINAL


@dataclass(frozen=True)
class Outcome:
    """`untuned` and `finalists` were measured in turns; `lost` counts candidates by what became of them."""

    work: Work
    record: Record
    untuned: Measurement
    finalists: Sequence[Measurement]
    beside: Sequence[Measurement]  # of `Options.beside`
    measured: int  # in this run
    recalled: int  # of an earlier run
    lost: dict[str, int]
    seconds: float

    @property
    def speedup(self) -> float:
        """Of the chosen schedule over the untuned one."""
        return self.untuned.seconds / self.record.seconds


def tune_work(
    measurer: Measurer,
    work: Work,
    spec: TargetSpec,
    roof: Roof,
    options: Options,
    folder: Path,
    database: ScheduleDatabase,
    on_trial: Callable[[Search, Measurement], None] = lambda _search, _measurement: None,
) -> Outcome:
    """Finds the schedule of one work. `folder` keeps the log of trials, from which a killed search goes on."""
    start = time.monotonic()
    problem, bucket = work.problem, work.bucket
    space, rule = space_of(problem, bucket, spec), spec.rule(problem).of(bucket)
    ranking = ranked(problem, work.rows, spec, space.members, roof)
    search = Search(space, first_schedules(space, rule, database), ranking, options.seed)
    with TrialLog(folder / trial_file(measurer, work, spec, options)) as log:
        outputs = log.outputs or log.decide(proxy_outputs(measurer, work, rule, options.search))
        proxy = replace(work, problem=replace(problem, n=outputs))
        search.recall(list(log.found.values()), list(log.begun))
        recalled = len(search.results)
        while len(search.results) < options.trials and search.stale() < options.patience:
            if time.monotonic() - start > options.seconds:
                break
            proposed = search.propose(min(measurer.capacity, options.trials - len(search.results)))
            if not proposed:
                break
            log.begin(proposed)
            for measurement in measurer.measure(proxy, proposed, search_plan(search, options.search)):
                log.end(measurement)
                search.take(measurement)
                on_trial(search, measurement)
        best = [m.schedule for m in search.best() if m.schedule != rule][:FINALISTS]
        final = [rule, *best, *options.beside]
        if [m.schedule for m in log.final] != final:
            log.finish(measurer.compare(work, final, options.final))
        untuned, finalists, beside = log.final[0], log.final[1 : len(best) + 1], log.final[len(best) + 1 :]
    lost: dict[str, int] = {}
    for found in search.results.values():
        if found.status != "ok":
            lost[found.status] = lost.get(found.status, 0) + 1
    record = make_record(work, spec, roof, untuned, finalists, len(search.results))
    spent = time.monotonic() - start
    return Outcome(work, record, untuned, finalists, beside, len(search.results) - recalled, recalled, lost, spent)


def search_plan(search: Search, plan: Plan) -> Plan:
    """A shorter plan for candidates that are far slower than the fastest."""
    fastest = min((m.seconds for m in search.results.values()), default=math.inf)
    return replace(plan, slow=min(plan.slow, max(_HOPELESS_SECONDS, _HOPELESS * fastest)))


def first_schedules(space: Space, rule: Schedule, database: ScheduleDatabase) -> list[Schedule]:
    """The untuned schedule, and those of similar problems where they are members of the space."""
    found = [rule]
    for record in database.neighbours(space.spec, space.problem, space.bucket)[:4]:
        schedule = refit(record.schedule, space.problem)
        if why_illegal(space.problem, space.bucket, space.spec, schedule) is None:
            found.append(schedule)
    return found


def proxy_outputs(measurer: Measurer, work: Work, rule: Schedule, plan: Plan) -> int:
    """N at which to search: fewer outputs where a run takes long on a CPU, for all blocks of a kernel do the same.

    A CPU's few cores have enough blocks in a few hundred outputs; a GPU's are measured whole.
    """
    device, outputs = measurer.fingerprint(), work.problem.n
    if device.kind != "cpu" or outputs <= _PROXY_OUTPUTS * device.units:
        return outputs
    (whole,) = measurer.measure(work, [rule], plan)
    if whole.status != "ok" or whole.seconds <= _PROXY_SECONDS:
        return outputs
    share = outputs * _PROXY_SECONDS / whole.seconds
    return min(outputs, _PROXY_OUTPUTS * max(device.units, math.ceil(share / _PROXY_OUTPUTS)))


def trial_file(measurer: Measurer, work: Work, spec: TargetSpec, options: Options) -> str:
    """Name of a search's log: whatever changes its measurements changes the name."""
    template = template_of(spec.rule(work.problem).of(work.bucket))
    determined_by = {
        "device": asdict(measurer.fingerprint()),
        "machine": spec.machine,
        "target": spec.name,
        "plan": asdict(options.search),
        "template": [template, VERSIONS[template]],
        "tvm": tvm_version(),
        "seed": options.seed,
    }
    digest = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:16]
    return f"{work.name}-{digest}.trials"


def make_record(
    work: Work, spec: TargetSpec, roof: Roof, untuned: Measurement, finalists: Sequence[Measurement], trials: int
) -> Record:
    """Of the chosen schedule, see `choose`."""
    device = untuned.device or next((m.device for m in finalists if m.device), None)
    right = sorted((m for m in [untuned, *finalists] if m.status == "ok"), key=lambda m: m.seconds)
    if not right or device is None:
        raise CompileError(f"{work.name}: no schedule gives the right result on this device: {untuned.error}")
    chosen = choose(untuned, right)
    others = [m for m in right if m is not chosen]
    assert chosen.cold is not None
    template = template_of(chosen.schedule)  # type: ignore[arg-type]
    return Record(
        machine=spec.machine,
        preset=preset_restriction(spec, device.kind),
        problem=work.problem,
        bucket=work.bucket,
        rows=work.rows,
        schedule=chosen.schedule,  # type: ignore[arg-type]
        template_version=VERSIONS[template],
        tvm=tvm_version(),
        device=device,
        seconds=chosen.cold.median,
        low=chosen.cold.low,
        high=chosen.cold.high,
        untuned_seconds=untuned.seconds if untuned.status == "ok" else chosen.cold.median,
        roofline_seconds=roofline_seconds(work.problem, work.rows, roof),
        trials=trials,
        runner_up=others[0].schedule if others else None,  # type: ignore[arg-type]
        runner_up_seconds=others[0].seconds if others else None,
    )


def choose(untuned: Measurement, right: Sequence[Measurement]) -> Measurement:
    """Of those that are right: the untuned schedule where none beats it, else the fastest that does.

    Where others that do are as fast but for the noise, the one with the least code: it compiles sooner.
    """
    better = [m for m in right if m is not untuned and (untuned.status != "ok" or beats(m, untuned))]
    if not better:
        return untuned
    fastest = min(m.seconds for m in better)
    near = [m for m in better if m.seconds <= fastest * (1 + NOISE)]
    return min(near, key=lambda m: (code_size(m.schedule), m.seconds))  # type: ignore[arg-type]


def beats(one: Measurement, other: Measurement) -> bool:
    """Whether a schedule is faster beyond noise: by `NOISE`, and its upper quartile below the other's median.

    Weights of a small model stay in a cache: there it must not be slower beyond noise.
    """
    assert one.cold is not None and other.cold is not None
    if one.cold.median >= other.cold.median * (1 - NOISE) or one.cold.high >= other.cold.median:
        return False
    if one.warm is None or other.warm is None or min(one.warm.count, other.warm.count) < _FEWEST:
        return True
    return one.warm.median <= other.warm.median * (1 + NOISE)
