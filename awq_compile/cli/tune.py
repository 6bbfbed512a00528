"""`awq-compile tune`: measures schedules here, and looks at what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq_compile.cli import bundles, records
from awq_compile.cli import options as o
from awq_compile.cli.console import Output, seconds, shown
from awq_compile.cli.records import time_words
from awq_compile.errors import CompileError, UsageError

if TYPE_CHECKING:
    from awq_compile.formats import QuantScheme
    from awq_compile.limits import CompileOptions
    from awq_compile.models.config import ModelConfig
    from awq_compile.targets.base import TargetSpec
    from awq_compile.tuning.measure import Measurer
    from awq_compile.tuning.problems import Share
    from awq_compile.tuning.rpc import Place
    from awq_compile.tuning.tune import Outcome

LOOK = "Looking at what was measured"
HOW = "How to search"
WHERE = "Where to measure"

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]", help="A Hugging Face directory, a checkpoint or a compiled directory."),
]
Target = Annotated[str, typer.Option("--target", "-t", help="The device to tune for.")]
Trials = Annotated[int, typer.Option(min=1, help="Candidates of a kernel at most.", rich_help_panel=HOW)]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", min=1.0, help="For all kernels together.", rich_help_panel=HOW, show_default="no limit"),
]
Seed = Annotated[int, typer.Option(min=0, max=o.MAX_SEED, help="Of the search and of the inputs.", rich_help_panel=HOW)]
Patience = Annotated[
    int, typer.Option(min=1, help="Candidates without a better one that end a search.", rich_help_panel=HOW)
]
Strategy = Annotated[
    str,
    typer.Option(
        help="ours, or metaschedule: TVM's own search, measured beside the untuned schedule. The compiler cannot use "
        "what it finds.",
        rich_help_panel=HOW,
    ),
]
Bucket = Annotated[
    list[str] | None,
    typer.Option(
        help="Only kernels for up to so many rows: gemv (1), pair (2), quad (4), small (8), medium (16), broad (32), "
        "large (64), wide (256), gemm (more); repeatable. A bucket that a target has no kernels for is the next one's.",
        rich_help_panel=HOW,
        show_default="all",
    ),
]
Tracker = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="On all devices of --device-key that a TVM RPC tracker has.",
        rich_help_panel=WHERE,
        show_default="this machine",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="On the device of one TVM RPC server.", rich_help_panel=WHERE),
]
DeviceKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="Under which servers offer the device.", rich_help_panel=WHERE)
]
Export = Annotated[
    Path | None,
    typer.Option(
        "--export-bundle",
        metavar="DIR",
        help="Write compiled candidates and a script that measures them on a machine that cannot be reached.",
        rich_help_panel=WHERE,
    ),
]
Import = Annotated[
    Path | None,
    typer.Option(
        "--import-results", metavar="FILE", help="Take in what the script of a bundle wrote.", rich_help_panel=WHERE
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A Ray cluster that builds kernels for devices elsewhere and for bundles: HOST:PORT, ray://HOST:PORT, "
        "auto, or local to start one here.",
        rich_help_panel=WHERE,
        show_default="this machine",
    ),
]
ListFlag = Annotated[bool, typer.Option("--list", help="List all records.", rich_help_panel=LOOK)]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="The schedule of every kernel of MODEL for the target: where it is from, its time, the roofline and "
        "the runner-up.",
        rich_help_panel=LOOK,
    ),
]
Merge = Annotated[
    bool,
    typer.Option("--merge", help="Take the records of the FILEs given instead of MODEL.", rich_help_panel=LOOK),
]
Into = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Merge into one file.", rich_help_panel=LOOK, show_default="your records"
    ),
]
Diff = Annotated[
    bool,
    typer.Option("--diff", help="Compare the records of the two FILEs given instead of MODEL.", rich_help_panel=LOOK),
]


def tune(
    inputs: Inputs = None,
    target: Target = "cpu",
    scheme: o.Scheme = None,
    trials: Trials = 64,
    seconds_: Seconds = None,
    seed: Seed = 0,
    patience: Patience = 24,
    bucket: Bucket = None,
    strategy: Strategy = "ours",
    rpc_tracker: Tracker = None,
    rpc_server: Server = None,
    device_key: DeviceKey = None,
    ray: Ray = None,
    export_bundle: Export = None,
    import_results: Import = None,
    list_records: ListFlag = False,
    explain: Explain = False,
    merge: Merge = False,
    out: Into = None,
    diff: Diff = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Find faster schedules for the kernels of a model by measuring them on the device, here or elsewhere.

    Every candidate is checked against the float64 reference first, in a process that may crash or hang. What is found
    is kept in your cache folder, and the next compilation for the target uses it. A run that is stopped goes on when
    it is started again.
    """
    output = Output(as_json, verbose)
    words = inputs or []
    chosen = [name for name, on in (("--list", list_records), ("--merge", merge), ("--diff", diff)) if on]
    paths = (("--export-bundle", export_bundle), ("--import-results", import_results))
    chosen += [name for name, path in paths if path is not None]
    if len(chosen) + explain > 1:
        raise UsageError(f"{' and '.join([*chosen, *(['--explain'] if explain else [])])} exclude each other")
    if list_records:
        records.list_records(output)
    elif merge:
        records.merge_files([Path(word) for word in words], out, output)
    elif diff:
        records.diff_files([Path(word) for word in words], output)
    elif import_results:
        bundles.take_results(import_results, output)
    else:
        if len(words) > 1:
            raise UsageError(f"one MODEL at a time, got {', '.join(words)}", hint="--merge and --diff take files")
        work = Kernels.of(words[0] if words else None, target, scheme, bucket, output)
        if explain:
            from awq_compile.targets.roofs import nominal_roof

            records.explain(work.spec, work.shares(nominal_roof(work.spec.name)), output)
            return
        if export_bundle:
            from awq_compile.targets.roofs import nominal_roof

            works = [share.work for share in work.shares(nominal_roof(work.spec.name))]
            bundles.write(export_bundle, works, work.spec, trials, seed, ray, output)
            return
        from awq_compile.tuning.rpc import Place

        place = Place.parse(rpc_tracker, rpc_server, device_key, ray)
        if strategy == "metaschedule":
            _metaschedule(work, place, trials, seconds_, seed, output)
        elif strategy != "ours":
            raise UsageError(f"unknown strategy {strategy!r}", hint="--strategy ours or --strategy metaschedule")
        else:
            output.result(tune_kernels(work, place, trials, seconds_, seed, patience, output))


class Kernels:
    """What is to be tuned: the kernels of a model for a target."""

    def __init__(
        self,
        spec: TargetSpec,
        config: ModelConfig,
        scheme: QuantScheme,
        options: CompileOptions,
        buckets: list[str],
    ) -> None:
        self.spec, self.config, self.scheme, self.options, self.buckets = spec, config, scheme, options, buckets

    @staticmethod
    def of(model: str | None, target: str, scheme: str | None, buckets: list[str] | None, output: Output) -> Kernels:
        """Resolves MODEL, which may be a compiled directory, and the scheme."""
        from awq_compile.cli.source import find_model
        from awq_compile.formats import QuantScheme
        from awq_compile.limits import CompileOptions
        from awq_compile.manifest import is_dist, open_dist
        from awq_compile.models.config import read_config
        from awq_compile.problem import ROW_BUCKETS
        from awq_compile.targets import resolve_target

        for name in buckets or ():
            if name not in ROW_BUCKETS:
                raise UsageError(f"unknown bucket {name!r}", hint=f"known: {', '.join(ROW_BUCKETS)}")
        spec = resolve_target(target)
        wanted = list(dict.fromkeys(buckets or ROW_BUCKETS))
        if model is not None and Path(model).is_dir() and is_dist(Path(model)):
            from awq_compile.verify.dist import compiled_from

            config, own, options = compiled_from(open_dist(Path(model)))
        else:
            source = find_model(model, output)
            config, own = read_config(source.path), QuantScheme.parse(spec.default_scheme)
            options = CompileOptions(min(config.context_window_size, 4096), min(config.context_window_size, 1024), 4)
            if source.quantised:
                from awq_compile.awq.checkpoint import open_checkpoint

                own = open_checkpoint(source.path).scheme
        chosen = QuantScheme.parse(scheme) if scheme else own
        spec.check_scheme(chosen)
        return Kernels(spec, config, chosen, options, wanted)

    def shares(self, roof: Any) -> list[Share]:
        """The kernels of the buckets that are wanted."""
        from awq_compile.tuning.problems import model_works

        found = model_works(self.config, self.scheme, self.spec, self.options, roof)
        return [share for share in found if share.work.bucket in self.buckets]


def _measurer(spec: TargetSpec, seed: int, place: Place) -> Measurer:
    return place.open(spec, seed)


def tune_kernels(
    kernels: Kernels, place: Place, trials: int, limit: float | None, seed: int, patience: int, output: Output
) -> dict[str, Any]:
    """Tunes and keeps; returns what `--json` prints."""
    import math

    from awq_compile.tuning.database import user_folder
    from awq_compile.tuning.session import tune_works
    from awq_compile.tuning.tune import Options

    found: list[dict[str, Any]] = []
    options = Options(trials=trials, patience=patience, seed=seed)
    with _measurer(kernels.spec, seed, place) as measurer:
        output.say(f"measuring on {measurer.fingerprint().label}")
        roof = measurer.roof()
        shares = kernels.shares(roof)
        done = 0
        with output.bar("tuning") as bar:

            def told(share: Share, search: Any, measurement: Any) -> None:
                best = search.best()
                words = f"{share.work.problem.name} {share.work.bucket}, {len(search.results)} of {trials}"
                if best:
                    words += f", best {time_words(best[0].seconds)}"
                if output.verbose and measurement.status != "ok":
                    output.detail(f"{measurement.status}: {measurement.schedule}: {measurement.error}")
                if bar.live:
                    bar.update(done, len(shares), None, words)

            for share, outcome in tune_works(
                measurer, shares, kernels.spec, roof, options, math.inf if limit is None else limit, told
            ):
                done += 1
                bar.update(done, len(shares), None, _outcome_words(share, outcome))
                found.append(_outcome_json(share, outcome))
        devices = getattr(measurer, "shares", {})
        dropped = getattr(measurer, "dropped", [])
    for where, count in sorted(devices.items()):
        output.say(f"{count} measured on {where}")
    for reason in dropped:
        output.say(f"dropped: {reason}")
    if found:
        speedup = math.exp(sum(math.log(row["speedup"]) for row in found) / len(found))
        output.say(
            f"{len(found)} kernels for {kernels.spec.name}: {speedup:.2f} times the untuned speed in the geometric "
            f"mean, in {shown(user_folder())}; compile again to use it"
        )
    return {"target": kernels.spec.name, "kernels": found, "devices": dict(devices), "dropped": dropped}


def _metaschedule(kernels: Kernels, place: Place, trials: int, limit: float | None, seed: int, output: Output) -> None:
    """TVM's search on the same kernels, and its best beside the schedule that the compiler would take."""
    import math

    from awq_compile.tuning.database import known_records
    from awq_compile.tuning.measure import FINAL, SEARCH
    from awq_compile.tuning.metaschedule import metaschedule

    spec, database, rows = kernels.spec, known_records(), []
    with _measurer(spec, seed, place) as measurer:
        output.say(f"measuring on {measurer.fingerprint().label}")
        shares = kernels.shares(measurer.roof())
        for share in shares:
            work = share.work
            seconds_each = math.inf if limit is None else limit / len(shares)
            try:
                found = metaschedule(measurer, work, spec, SEARCH, trials=trials, seconds=seconds_each, seed=seed)
            except CompileError as error:
                output.say(str(error))
                rows.append({"kernel": work.problem.name, "bucket": work.bucket, "error": str(error)})
                continue
            good = [m for m in found if m.status == "ok"]
            words = f"{work.problem.name} {work.bucket}: {len(good)} of {len(found)} candidates right"
            row: dict[str, Any] = {"kernel": work.problem.name, "bucket": work.bucket, "tried": len(found)}
            if good:
                rule = spec.rule(work.problem).of(work.bucket)
                ours = database.choose(spec, work.problem, work.bucket, rule)
                theirs = min(good, key=lambda m: m.seconds).schedule
                one, other = measurer.compare(work, [ours.schedule, theirs], FINAL)
                row |= {"ours": one.seconds, "source": ours.source, "metaschedule": other.seconds}
                words += f", the best {time_words(other.seconds)}; ours ({ours.words}) {time_words(one.seconds)}"
            output.say(words)
            rows.append(row)
    output.result({"target": spec.name, "kernels": rows})


def _outcome_words(share: Share, outcome: Outcome) -> str:
    record = outcome.record
    roofline = record.roofline_seconds / record.seconds
    lost = "".join(f", {count} {what}" for what, count in sorted(outcome.lost.items()))
    return (
        f"{share.work.problem.name} {share.work.bucket}: {time_words(record.seconds)}, "
        f"{outcome.speedup:.2f} times untuned, {roofline:.0%} of the roofline, "
        f"{outcome.measured} measured and {outcome.recalled} recalled{lost}, "
        f"{seconds(outcome.seconds)}"
    )


def _outcome_json(share: Share, outcome: Outcome) -> dict[str, Any]:
    from awq_compile.tuning.templates import encode_schedule

    record = outcome.record
    return {
        "kernel": share.work.problem.name,
        "bucket": share.work.bucket,
        "share": share.share,
        "seconds": record.seconds,
        "untuned_seconds": outcome.untuned.seconds,
        "roofline_seconds": record.roofline_seconds,
        "speedup": outcome.speedup,
        "schedule": encode_schedule(record.schedule),
        "measured": outcome.measured,
        "recalled": outcome.recalled,
        "lost": outcome.lost,
    }
