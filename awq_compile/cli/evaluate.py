"""`awq-compile eval PATH…`: perplexity and KL divergence of originals, checkpoints and compiled libraries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from awq_compile.cli import options as o
from awq_compile.cli.console import Bar, Output, shown
from awq_compile.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from awq_compile.evaluate import I64, Logits
    from awq_compile.formats import QuantScheme

DEFAULT_WINDOW: Final = 512


@dataclass(frozen=True)
class Candidate:
    """One row of the table. `load` reads the model when its turn comes."""

    name: str
    label: str
    load: Callable[[], Logits] = field(compare=False)


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|Q|DIST…",
            help="A model counts as the original, rounded to nearest, and by AWQ; a checkpoint and a compiled "
            "directory as themselves. KL is measured from the first row.",
        ),
    ],
    text: o.Text = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens scored together.")] = DEFAULT_WINDOW,
    windows: Annotated[int | None, typer.Option(min=1, help="How many windows.", show_default="the whole text")] = None,
    scheme: o.Scheme = None,
    calib: o.Calib = None,
    calib_samples: o.CalibSamples = None,
    calib_length: o.CalibLength = None,
    seed: o.Seed = 0,
    target: o.Library = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Perplexity and KL divergence: original, round-to-nearest, AWQ, compiled library."""
    from awq_compile.awq.checkpoint import is_checkpoint, open_checkpoint
    from awq_compile.cli.quantize import calibration_spec
    from awq_compile.cli.source import find_model
    from awq_compile.formats import QuantScheme
    from awq_compile.manifest import is_dist, open_dist
    from awq_compile.models.config import read_config

    output = Output(as_json, verbose)
    dists = [open_dist(Path(p)) for p in paths if is_dist(Path(p))]
    for dist in dists:
        dist.library(target)  # an error names the targets that there are
    checkpoints = [open_checkpoint(Path(p)) for p in paths if is_checkpoint(Path(p))]
    schemes = {QuantScheme.parse(dist.manifest.scheme) for dist in dists} | {q.scheme for q in checkpoints}
    chosen = (
        QuantScheme.parse(scheme) if scheme else schemes.pop() if len(schemes) == 1 else QuantScheme.parse("w4g128")
    ).in_order("NK")
    sources = {word: find_model(word, output) for word in paths if not is_dist(Path(word))}
    tokenizer = sources[paths[0]].path if paths[0] in sources else Path(paths[0])
    content = text or bundled_text()
    tokens = windows_of_text(content, tokenizer, window, windows, "--text", "or a smaller --window")
    candidates: list[Candidate] = []
    for word in paths:
        path = Path(word)
        if is_dist(path):
            candidates.append(library_candidate(path, f"compiled library, {shown(path)}", target))
        elif is_checkpoint(path):
            candidates.append(checkpoint_candidate(path, "checkpoint", f"checkpoint, {shown(path)}"))
        else:
            source, path = sources[word], sources[word].path
            spec = calibration_spec(read_config(path), calib, calib_samples, calib_length, seed)
            rounded = cached(source, chosen, spec, "rtn", output)
            found = cached(source, chosen, spec, "awq", output)
            candidates[:0] = model_candidates(path, chosen, rounded, found)
    if len({c.name for c in candidates}) < len(candidates):  # several of a kind: their paths tell them apart
        candidates = [Candidate(f"{c.name} {i}", c.label, c.load) for i, c in enumerate(candidates, 1)]
    result = measure(candidates, content, tokens, output)
    show(result, output)
    output.result(result)


def bundled_text() -> Path:
    """The held-out text of the demo model."""
    import awq_compile

    return Path(awq_compile.__file__).parent / "data" / "demo" / "heldout.txt"


def windows_of_text(
    text: Path, tokenizer_dir: Path, window: int, most: int | None, option: str, otherwise: str = ""
) -> I64:
    """The windows to measure on. An unusable text is an error that names `option`, and what to do `otherwise`."""
    from awq_compile.evaluate import text_windows

    try:
        return text_windows(text, tokenizer_dir, window, most)
    except CalibrationError as error:
        wanted = f"{option} FILE with UTF-8 text of {window} tokens or more"
        raise CalibrationError(str(error), hint=", ".join(filter(None, (wanted, otherwise)))) from None


def cached(source: Any, scheme: QuantScheme, spec: Any, method: Any, output: Output) -> Path:
    """The cached checkpoint of a model, made now when it is not there."""
    from awq_compile.cli.source import cached_checkpoint, quantised

    folder = cached_checkpoint(source, scheme, spec, method)
    return quantised(source, folder, scheme, spec, method, output).path


def model_candidates(model_dir: Path, scheme: QuantScheme, rounded: Path, found: Path | None = None) -> list[Candidate]:
    """The original, its rounding to nearest, and AWQ's checkpoint where there is one."""

    def original() -> Logits:
        from awq_compile.evaluate import original_model, torch_logits

        return torch_logits(original_model(model_dir))

    candidates = [
        Candidate("original", "original", original),
        checkpoint_candidate(rounded, "rtn", f"round-to-nearest {scheme.name}, torch"),
    ]
    if found is not None:
        candidates.append(checkpoint_candidate(found, "awq", f"AWQ {scheme.name}, torch"))
    return candidates


def checkpoint_candidate(path: Path, name: str, label: str) -> Candidate:
    """A checkpoint's dequantised weights in torch."""

    def load() -> Logits:
        from awq_compile.awq.checkpoint import open_checkpoint
        from awq_compile.evaluate import dequantized_model, torch_logits

        return torch_logits(dequantized_model(open_checkpoint(path)))

    return Candidate(name, label, load)


def library_candidate(dist: Path, label: str, target: str | None = None) -> Candidate:
    """A compiled library, run by TVM."""

    def load() -> Logits:
        from awq_compile.runtime.engine import Engine

        return Engine(dist, target=target).logits

    return Candidate("library", label, load)


def _counted(windows: Any, bar: Bar) -> Iterator[Any]:
    """The windows, with progress now and then."""
    started, total = time.monotonic(), len(windows)
    for done, window in enumerate(windows):
        if done and (done == 1 or done % 32 == 0):
            left = (time.monotonic() - started) / done * (total - done)
            bar.update(done, total, left, f"{done} of {total}")
        yield window
    bar.update(total, total, 0.0, f"{total} of {total}")


def measure(candidates: list[Candidate], text: Path, windows: I64, output: Output) -> dict[str, Any]:
    """Scores every candidate on every window of `text`."""
    from awq_compile.evaluate import paired_difference, score
    from awq_compile.manifest import file_sha256

    window = windows.shape[1]
    with output.bar(f"measuring {len(candidates)} models on windows of {window} tokens") as bar:
        loaded = {c.name: c.load() for c in candidates}
        scores = score(loaded, _counted(windows, bar), candidates[0].name)
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        found = scores[candidate.name]
        gap = paired_difference(found, scores[candidates[0].name])
        rows.append(
            {
                "name": candidate.name,
                "label": candidate.label,
                "perplexity": round(found.perplexity, 4),
                "kl": round(found.mean_kl, 6),
                "nll_change": round(gap.mean, 6),
                "nll_change_error": round(gap.standard_error, 6) if math.isfinite(gap.standard_error) else None,
            }
        )
    if not all(math.isfinite(row["perplexity"]) for row in rows):
        raise UsageError("a model computes NaN or infinite probabilities on this text", hint="check the model with -v")
    return {"text": text.name, "sha256": file_sha256(text), "window": window, "windows": len(windows), "rows": rows}


def show(result: dict[str, Any], output: Output) -> None:
    """The table for people."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("perplexity", "change", "KL (nats)"):
        table.add_column(name, justify="right")
    first = result["rows"][0]
    for row in result["rows"]:
        change = f"{(row['perplexity'] / first['perplexity'] - 1) * 100:+.2f}%" if row is not first else ""
        table.add_row(row["label"], f"{row['perplexity']:.4f}", change, f"{row['kl']:.5f}" if row is not first else "")
    output.say(f"{result['text']}, {result['windows']} windows of {result['window']} tokens")
    output.table(table)
