"""`tune --export-bundle` and `tune --import-results`: measuring on machines that cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awq_compile.cli.console import Output, shown

if TYPE_CHECKING:
    from awq_compile.targets.base import TargetSpec
    from awq_compile.tuning.measure import Work


def write(
    folder: Path, works: Sequence[Work], spec: TargetSpec, trials: int, seed: int, ray: str | None, output: Output
) -> None:
    """Writes a bundle of kernels, which the Ray cluster at `ray` builds where one is given."""
    from contextlib import ExitStack

    from awq_compile.tuning.bundle import write_bundle
    from awq_compile.tuning.database import known_records
    from awq_compile.tuning.ray_builds import RayBuilds, check_address

    with ExitStack() as stack, output.bar("compiling") as bar:
        builds = stack.enter_context(RayBuilds(check_address(ray), spec)) if ray else None
        done = 0

        def told(work: Work, count: int) -> None:
            nonlocal done
            done += 1
            bar.update(done, len(works), None, f"{work.problem.name} {work.bucket}, {count} candidates in all")

        count = write_bundle(
            folder, works, spec, known_records(), trials=trials, seed=seed, builds=builds, on_work=told
        )
    output.say(
        f"{count} candidates of {len(works)} kernels for {spec.name} in {shown(folder)}; on the other machine: "
        f"python {folder.name}/measure.py, and here: awq-compile tune --import-results results.jsonl"
    )
    output.result({"target": spec.name, "bundle": str(folder), "kernels": len(works), "candidates": count})


def take_results(file: Path, output: Output) -> None:
    """Puts the records of a bundle's results into the user's database."""
    from awq_compile.tuning.bundle import read_results
    from awq_compile.tuning.database import add_records, device_file, user_folder

    results = read_results(file)
    for note in results.notes:
        output.say(note)
    for record in results.records:
        add_records(device_file(user_folder(), record), [record])
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(results.statuses.items()))
    output.say(f"{len(results.records)} records for {results.target} from {shown(file)} ({statuses})")
    output.result({"target": results.target, "records": len(results.records), "statuses": results.statuses})
