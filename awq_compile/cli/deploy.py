"""`awq-compile deploy DIST`: a model onto an Android phone, into the folder of MLC's app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, shown
from awq_compile.errors import EnvironmentMissingError

if TYPE_CHECKING:
    from awq_compile.deploy.adb import Adb
    from awq_compile.deploy.device import Phone


def deploy(
    path: Annotated[Path, typer.Argument(metavar="DIST", help="A compiled directory, for android.")],
    serial: Annotated[
        str | None,
        typer.Option(metavar="S", help="Which phone, as adb devices lists it.", show_default="the only one"),
    ] = None,
    app: Annotated[
        str, typer.Option(metavar="PACKAGE", help="The app that gets the model: MLC's, or one built on it.")
    ] = "ai.mlc.mlcchat",
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="The library that the app has.", show_default="by the phone's GPU"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every command, and run only those that change nothing.")
    ] = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Send a model to an Android phone: only files that differ, each checked there; goes on after an interruption."""
    from awq_compile.deploy.adb import check_serial
    from awq_compile.deploy.device import STAGE, STORAGE, free_bytes
    from awq_compile.deploy.plan import app_folder, check_space, choose_library, make_plan, model_files, model_folder
    from awq_compile.deploy.transfer import digests, send
    from awq_compile.manifest import open_dist

    output = Output(as_json, verbose)
    commands: list[str] = []

    def tell(command: str) -> None:
        commands.append(command)
        output.say(command) if dry_run else output.detail(command)

    dist = open_dist(path)
    files = model_files(dist)
    folder_of_app = app_folder(app)
    choose_library(dist, None, target)  # before a phone is looked for
    adb, phone = _phone(check_serial(serial) if serial else None, app, dry_run, tell, output)
    chosen = choose_library(dist, phone.gpu if phone else None, target)
    folder = model_folder(dist, chosen, app)
    plan = make_plan(files, digests(adb, folder) if phone else {})
    if phone:
        check_space(plan, free_bytes(adb, STORAGE), free_bytes(adb, STAGE))
        _warn(adb, phone, folder_of_app, Path(folder).name, output)
    with output.bar("sending") as bar:
        send(adb, plan, folder, (lambda *_: None) if dry_run else bar.update)
    if not dry_run:
        output.say(f"{shown(path)}: in {folder}")
        output.say(
            f"  {len(plan.send)} files sent, {nbytes(plan.nbytes)}; {len(plan.keep)} were there already"
            + (f"; {len(plan.remove)} of another version removed" if plan.remove else "")
        )
        output.say(f"  start the app anew; it must be built with the library for {chosen} (docs/android.md)")
    output.result(
        {
            "phone": asdict(phone) if phone else None,
            "target": chosen,
            "folder": folder,
            "sent": [file.name for file in plan.send],
            "kept": [file.name for file in plan.keep],
            "removed": list(plan.remove),
            "commands": commands,
        }
    )


def _phone(
    serial: str | None, app: str, dry_run: bool, tell: Callable[[str], None], output: Output
) -> tuple[Adb, Phone | None]:
    """The phone, checked. A dry run does without one: it then tells what a phone with nothing on it would get."""
    from awq_compile.deploy.adb import Adb, choose_device
    from awq_compile.deploy.device import check_phone, read_phone

    listing = Adb(dry_run=dry_run, tell=tell)
    try:
        devices = listing.devices()
    except EnvironmentMissingError:
        if not dry_run:
            raise
        devices = []
    if dry_run and not devices:
        output.step("no phone is connected: the commands for one that has nothing yet")
        return Adb(serial or "SERIAL", dry_run=True, tell=tell), None
    adb = Adb(choose_device(devices, serial), dry_run=dry_run, tell=tell)
    phone = read_phone(adb, app)
    output.step(
        f"{phone.model} ({phone.serial}): {phone.renderer or 'unknown GPU'}, platform {phone.platform or 'unknown'}, "
        f"OpenCL driver {phone.opencl or 'none'}"
    )
    check_phone(phone, app)
    return adb, phone


def _warn(adb: Adb, phone: Phone, folder: str, model: str, output: Output) -> None:
    """What may keep the app from running the model, and cannot be told for sure from here."""
    from awq_compile.deploy.device import PUBLIC_LIBRARIES
    from awq_compile.deploy.package import APP_CONFIG

    if not phone.opencl_public:
        output.step(f"note: {PUBLIC_LIBRARIES} does not name {Path(phone.opencl).name}: apps may not be let use it")
    listed = adb.try_shell("cat", f"{folder}/{APP_CONFIG}")
    if listed and f'"{model}"' not in listed:
        output.step(
            f"note: the app keeps a list of models of its own, without {model}; to have it read the one it was built "
            f"with: adb -s {adb.serial} shell rm {folder}/{APP_CONFIG}"
        )
