"""The HTML report of a sweep: one file, with a table of the cells and a plot of the kernels of each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any, Final

from awq_compile.tuning.sweep import CellResult

_STYLE: Final = (
    "body{font:15px sans-serif;max-width:70em;margin:2em auto}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)
_WIDTH: Final = 9.0  # inches


def sweep_html(results: Sequence[CellResult]) -> str:
    """The report. Without matplotlib it has no plots, and says so."""
    rows = [
        [r.cell.label, str(len(r.kernels)), f"{r.speedup:.2f}", f"{_share(r):.0%}", _devices(r)]
        if r.kernels
        else [r.cell.label, "0", "", "", r.error or "no kernels"]
        for r in results
    ]
    parts = [_table(["cell", "kernels", "speed-up", "of the roofline", "measured on"], rows)]
    for result in results:
        if result.kernels:
            parts += [f"<h2>{escape(result.cell.label)}</h2>", plot(result), _kernels(result)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>awq-compile sweep</title>'
        f"<style>{_STYLE}</style><h1>awq-compile sweep</h1>{''.join(parts)}</html>\n"
    )


def plot(result: CellResult) -> str:
    """An SVG: for each kernel its roofline time, and its time before and after."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "<p>No plot: pip install 'awq-compile[farm]'</p>"
    import matplotlib

    kernels = list(reversed(result.kernels))
    figure = Figure((_WIDTH, 1.2 + 0.28 * len(kernels)), layout="constrained")
    axes = figure.subplots()
    places = range(len(kernels))
    for key, label, mark, colour in (
        ("roofline_seconds", "roofline", "|", "black"),
        ("untuned_seconds", "before", "o", "silver"),
        ("seconds", "after", "o", "tab:blue"),
    ):
        axes.scatter([k[key] * 1e6 for k in kernels], places, marker=mark, color=colour, label=label, zorder=3)
    axes.set_yticks(places, [f"{k['kernel']} {k['bucket']}".replace("$", r"\$") for k in kernels], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("µs")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "none"}):  # equal results, equal files
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _kernels(result: CellResult) -> str:
    rows: list[list[str]] = []
    for k in result.kernels:
        times = [f"{k[key] * 1e6:.4g}" for key in ("roofline_seconds", "untuned_seconds", "seconds")]
        rows.append([f"{k['kernel']} {k['bucket']}", *times, f"{k['untuned_seconds'] / k['seconds']:.2f}"])
    return _table(["kernel", "roofline, µs", "before, µs", "after, µs", "speed-up"], rows)


def _share(result: CellResult) -> float:
    """Of the roofline's speed, over all kernels with their shares of a step."""
    weights = [float(k["share"]) for k in result.kernels]
    reached = [float(k["roofline_seconds"]) / float(k["seconds"]) for k in result.kernels]
    return sum(w * r for w, r in zip(weights, reached, strict=True)) / sum(weights)


def _devices(result: CellResult) -> str:
    return ", ".join(f"{where} ({count})" for where, count in sorted(result.devices.items())) or "this machine"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(word)}</th>' for word in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(str(word))}</td>' for word in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
