"""`awq-compile quantize MODEL -o Q`: AWQ only; a checkpoint to keep, resume and compile from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Output, nbytes, seconds, shown
from awq_compile.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from awq_compile.awq.calibrate import CalibrationSpec
    from awq_compile.awq.checkpoint import QuantizedModel
    from awq_compile.awq.quantize import Method
    from awq_compile.formats import QuantScheme
    from awq_compile.models.config import ModelConfig


def choose_scheme(
    scheme: str | None, bits: int | None, group_size: int | None, asymmetric: bool, head_bits: int | None
) -> QuantScheme:
    """The scheme that the options describe; w4g128 where they say nothing."""
    from awq_compile.formats import Float16Spec, QuantScheme, QuantSpec

    if scheme is not None:
        if bits is not None or group_size is not None or asymmetric or head_bits is not None:
            raise UsageError(
                "--scheme says all that --bits, --group-size, --asymmetric and --head-bits say: give one or the other",
                hint="--scheme w4g128, or --bits 4 --group-size 128",
            )
        return QuantScheme.parse(scheme)
    linear = QuantSpec(bits or 4, group_size or 128, symmetric=not asymmetric)
    if head_bits in (None, 16):
        return QuantScheme(linear, Float16Spec())
    if head_bits not in (4, 8):
        raise UsageError(f"--head-bits must be 16, 8 or 4, got {head_bits}", hint="--head-bits 8")
    return QuantScheme(linear, QuantSpec(head_bits, linear.group, linear.symmetric))


def choose_method(method: str) -> Method:
    """`awq` or `rtn`."""
    if method == "awq":
        return "awq"
    if method == "rtn":
        return "rtn"
    raise UsageError(f"--method must be awq or rtn, got {method!r}", hint="--method awq")


def tell_unread_text(method: Method, calib: str | None, output: Output) -> None:
    """Rounding to nearest needs no calibration, so a text that is given changes nothing."""
    if method == "rtn" and calib is not None:
        output.step(f"--method rtn calibrates nothing, so --calib {calib} is not read")


def calibration_spec(
    config: ModelConfig, calib: str | None, samples: int | None, length: int | None, seed: int
) -> CalibrationSpec:
    """The calibration that the options describe; windows are at most as long as the model's context.

    A text that is not there is an error also where it is not read, for the spec names checkpoints by its content.
    """
    from awq_compile.awq.calibrate import BUNDLED, CalibrationSpec

    if calib is not None and calib != BUNDLED and not calib.startswith("datasets:") and not Path(calib).is_file():
        raise CalibrationError(f"the calibration text {calib} is not a file", hint="--calib FILE")
    if length is None:
        length = min(CalibrationSpec.length, config.context_window_size)
    given: dict[str, Any] = {"source": calib, "samples": samples, "length": length, "seed": seed}
    return CalibrationSpec(**{name: value for name, value in given.items() if value is not None})


def directory_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory or model id.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="Q", help="Checkpoint to write, or to go on with.")],
    scheme: o.Scheme = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    asymmetric: o.Asymmetric = False,
    head_bits: o.HeadBits = None,
    method: o.Method = "awq",
    calib: o.Calib = None,
    calib_samples: o.CalibSamples = None,
    calib_length: o.CalibLength = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Quantise MODEL into the checkpoint Q, layer by layer; a stopped run goes on where it was."""
    from awq_compile.cli.source import find_model, quantised
    from awq_compile.models.config import read_config

    output = Output(as_json, verbose)
    chosen = choose_scheme(scheme, bits, group_size, asymmetric, head_bits)
    how = choose_method(method)
    tell_unread_text(how, calib, output)
    source = find_model(model, output)
    if source.quantised:
        raise UsageError(f"{model} is quantised already", hint=f"awq-compile {model} compiles it")
    started = time.monotonic()
    calibration = calibration_spec(read_config(source.path), calib, calib_samples, calib_length, seed)
    made = quantised(source, out, chosen, calibration, how, output)
    took = time.monotonic() - started
    if output.verbose or output.json:
        output.table(layer_table(made))
    size = directory_bytes(out)
    output.say(f"{shown(out)}: {source.name} as {chosen.name} ({method}), {nbytes(size)}, in {seconds(took)}")
    output.say(f"next: awq-compile {shown(out)} --target cpu")
    reports = [report.to_json() for report in made.reports]
    output.result(
        {
            "checkpoint": str(out),
            "scheme": chosen.name,
            "method": method,
            "nbytes": size,
            "seconds": took,
            "layers": reports,
        }
    )


def layer_table(model: QuantizedModel) -> Any:
    """Errors of every linear, round-to-nearest against what was kept."""
    from rich.table import Table

    table = Table("linear", "rounded", "kept", "error", "scale", box=None, pad_edge=False)
    for report in model.reports:
        before = "" if report.rtn_error is None else f"{report.rtn_error:.4f}"
        after = "" if report.error is None else f"{report.error:.4f}"
        table.add_row(report.name, before, report.kept, after, f"{report.kind} {report.ratio:.2f}")
    return table
