"""report.json and report.html: what was quantised, how well, how large, with which kernels.

The page is one file: no script, nothing from elsewhere, every string escaped, the charts inline SVG written
here. No times, so equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from awq_compile.manifest import TENSOR_CACHE, LibraryEntry
from awq_compile.models.parameters import model_parameters

if TYPE_CHECKING:
    from awq_compile.awq.checkpoint import QuantizedModel

Json = dict[str, Any]


def model_sizes(model: QuantizedModel) -> Json:
    """Bytes of the parameters, packed and in float16, and bits per weight with scales and zero points."""
    count, packed, linear_count, linear_bytes = 0, 0, 0, 0
    for parameter in model_parameters(model.config, model.scheme):
        elements = math.prod(parameter.shape)
        size = 2 * elements if parameter.spec is None else parameter.spec.nbytes(*parameter.shape)
        count, packed = count + elements, packed + size
        if parameter.spec is model.scheme.linear or parameter.spec == model.scheme.linear:
            linear_count, linear_bytes = linear_count + elements, linear_bytes + size
    return {
        "weights": count,
        "parameter_bytes": packed,
        "float16_bytes": 2 * count,
        "bits_per_weight": round(8 * packed / count, 4),
        "linear_weights": linear_count,
        "linear_bits_per_weight": round(8 * linear_bytes / max(linear_count, 1), 4),
    }


def build_report(
    name: str,
    model: QuantizedModel,
    dist_dir: Path,
    libraries: Mapping[str, LibraryEntry],
    compiled: Mapping[str, Json],
    checks: Mapping[str, Json],
    options: Json,
    versions: Mapping[str, str],
    evaluation: Json | None = None,
) -> Json:
    """report.json as data. `compiled`, `checks` and `libraries` are by target name."""
    config = model.config
    shards = sorted(p.name for p in dist_dir.glob("params_shard_*.bin"))
    return {
        "model": name,
        "architecture": config.architecture.hf_name,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "scheme": model.scheme.name,
        "method": model.method,
        "calibration": model.meta.get("calibration"),
        "sizes": {**model_sizes(model), "shards": len(shards), "index": TENSOR_CACHE},
        "linears": [report.to_json() for report in model.reports],
        "libraries": {
            target: {
                "path": entry.path,
                "nbytes": (dist_dir / entry.path).stat().st_size,
                "tvm_target": entry.tvm_target,
                "verification": checks[target],
                **compiled[target],
            }
            for target, entry in libraries.items()
        },
        "evaluation": evaluation,
        "options": options,
        "versions": dict(versions),
    }


_STYLE: Final = """
:root { --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --page: #f7f8fa; --card: #fff;
  --rtn: #b54708; --awq: #175cd3; --good: #067647; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #30363f;
  --page: #14171c; --card: #1b2027; --rtn: #f79009; --awq: #53b1fd; --good: #47cd89; --bad: #f97066 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px }
h1 { margin: 0; font-size: 28px; letter-spacing: -.01em }
h1 + p { margin: 4px 0 28px; color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 0 0 20px }
h2 { margin: 0 0 4px; font-size: 17px }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 78ch }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-bottom: 20px }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px }
.fact b { display: block; font-size: 23px; font-weight: 650; letter-spacing: -.01em }
.fact span { color: var(--soft); font-size: 13px; display: block }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: left; color: var(--soft); font-weight: 550; white-space: nowrap }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
tr:last-child td { border-bottom: 0 }
.facts-table td:first-child { width: 190px; color: var(--soft) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { font: 12.5px/1.5 ui-monospace, Menlo, monospace; overflow-wrap: anywhere }
.good { color: var(--good) } .bad { color: var(--bad) } .soft { color: var(--soft) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px 20px }
.panels svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif }
svg .title { fill: var(--ink); font-size: 11.5px; font-weight: 600 }
svg .grid { stroke: var(--line) }
svg .rtn { stroke: var(--rtn); fill: var(--rtn) } svg .awq { stroke: var(--awq); fill: var(--awq) }
svg polyline.rtn, svg polyline.awq { fill: none; stroke-width: 1.8 }
.key i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; vertical-align: middle;
  margin: 0 6px 0 0 }
.key span { margin-right: 20px; font-size: 13px }
details summary { cursor: pointer; color: var(--soft); margin-top: 10px }
"""


def render_html(report: Json) -> str:
    """The page for people."""
    title = f"{report['model']} as {report['scheme']}"
    method = {"awq": "AWQ", "rtn": "round-to-nearest"}.get(report["method"], report["method"])
    subtitle = (
        f"{report['architecture']}, {report['layers']} layers, hidden size {report['hidden_size']}, "
        f"vocabulary {report['vocab_size']}; quantised by {method}"
    )
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>",
        _facts(report),
        _evaluation(report["evaluation"]) if report["evaluation"] else "",
        _errors(report["linears"], report["method"]),
        *(_library(target, entry) for target, entry in report["libraries"].items()),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.2f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"


def _fact(value: str, label: str) -> str:
    return f'<div class="fact"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _facts(report: Json) -> str:
    size = report["sizes"]
    facts = [
        _fact(_megabytes(size["parameter_bytes"]), f"of parameters; {_megabytes(size['float16_bytes'])} in float16"),
        _fact(
            f"{size['bits_per_weight']:.2f} bits",
            f"per weight; {size['linear_bits_per_weight']:.2f} in the layers' linears, scales included",
        ),
    ]
    for target, entry in report["libraries"].items():
        facts.append(_fact(_megabytes(entry["nbytes"]), f"library for {target}"))
    rows = {row["name"]: row for row in (report["evaluation"] or {}).get("rows", [])}
    if "library" in rows:
        fp16 = f"; {rows['original']['perplexity']:.3f} unquantised" if "original" in rows else ""
        facts.append(_fact(f"{rows['library']['perplexity']:.3f}", f"perplexity of the library{fp16}"))
    return f'<div class="facts">{"".join(facts)}</div>'


def _pairs(rows: Iterable[Sequence[str]]) -> str:
    """Name and value, without a head; cells are HTML already."""
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="facts-table">{body}</table>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[int]) -> str:
    """Cells are HTML already."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", [escape(h) for h in head])}</tr>{body}</table></div>'


def _section(title: str, intro: str, content: str) -> str:
    lead = f"<p>{escape(intro)}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def _evaluation(evaluation: Json) -> str:
    reference = evaluation["rows"][0]["perplexity"]
    rows = []
    for i, row in enumerate(evaluation["rows"]):
        change = f"{(row['perplexity'] / reference - 1) * 100:+.2f}%" if i else ""
        rows.append([escape(row["label"]), f"{row['perplexity']:.4f}", change, f"{row['kl']:.5f}" if i else ""])
    intro = (
        f"{evaluation['text']}: {evaluation['windows']} windows of {evaluation['window']} tokens, each scored without "
        "context from the others. KL is the mean divergence from the first row, in nats per token."
    )
    return _section("Perplexity", intro, _table(["", "perplexity", "change", "KL"], rows, {1, 2, 3}))


def _errors(linears: list[Json], method: str) -> str:
    """Chart and table of the relative output error of every linear."""
    measured = [row for row in linears if row["rtn_error"] is not None and row["error"] is not None]
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for row in measured:
        parts = row["name"].removesuffix(".weight").split(".")
        if len(parts) > 3 and parts[1] == "layers" and parts[2].isdigit():
            kinds.setdefault(parts[-1], []).append((int(parts[2]), row["rtn_error"], row["error"]))
    panels = "".join(_panel(kind, points) for kind, points in kinds.items())
    key = (
        ""
        if method == "rtn"
        else (
            '<p class="key"><span><i style="background:var(--rtn)"></i>round-to-nearest</span>'
            '<span><i style="background:var(--awq)"></i>kept</span></p>'
        )
    )
    rows = []
    for row in linears:
        before, after = row["rtn_error"], row["error"]
        gain = f"{(after / before - 1) * 100:+.1f}%" if before and after is not None else ""
        scale = "identity" if row["kind"] == "identity" else f"{row['kind']}, {row['ratio']:.2f}"
        rows.append(
            [
                f"<code>{escape(row['name'])}</code>",
                "×".join(str(int(d)) for d in row["shape"]),
                escape(row["spec"]),
                "" if before is None else f"{before:.4f}",
                "" if after is None else f"{after:.4f}",
                f'<span class="{"good" if gain.startswith("-") else "soft"}">{gain}</span>',
                escape(scale),
                f"{row['clipped'] * 100:.0f}%",
                escape(row["kept"]) + (f' <span class="soft">{escape(row["note"])}</span>' if row["note"] else ""),
            ]
        )
    head = ["linear", "shape", "format", "rounded", "kept", "change", "scale", "clipped", "method"]
    table = _table(head, rows, {3, 4, 5, 7})
    intro = "Relative error of each linear, by layer. Nothing was calibrated."
    if method != "rtn":
        intro = (
            "Relative error of each linear's output on the calibration text, by layer: what rounding to nearest "
            "would have cost, and what was kept."
        )
    content = (f'{key}<div class="panels">{panels}</div>' if panels else "") + (
        f"<details{'' if panels else ' open'}><summary>All {len(linears)} linears</summary>{table}</details>"
        if linears
        else ""
    )
    return _section("Error by layer", intro, content)


def _panel(kind: str, points: list[tuple[int, float, float]]) -> str:
    """One linear kind: error over layers, two lines."""
    width, height, left, right, top, bottom = 260, 150, 34, 8, 22, 20
    largest = max(max(rtn, kept) for _, rtn, kept in points) or 1.0
    step = 10 ** math.floor(math.log10(largest))
    ceiling = next(f * step for f in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if f * step >= largest * 0.999999)
    last = max(layer for layer, _, _ in points)

    def x(layer: int) -> float:
        return left + (width - left - right) * (layer / last if last else 0.5)

    def y(value: float) -> float:
        return float(top + (height - top - bottom) * (1 - value / ceiling))

    parts = [f'<text class="title" x="{left}" y="12">{escape(kind)}</text>']
    for i in range(3):
        value = ceiling * i / 2
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    for layer in sorted({0, last // 2, last}):
        words = f"layer {layer}" if layer == 0 else str(layer)
        parts.append(f'<text x="{x(layer):.1f}" y="{height - 5}" text-anchor="middle">{words}</text>')
    for index, style in ((1, "rtn"), (2, "awq")):
        line = " ".join(f"{x(point[0]):.1f},{y(point[index]):.1f}" for point in points)
        parts.append(f'<polyline class="{style}" points="{line}"/>')
        if len(points) <= 40:
            parts += [f'<circle class="{style}" cx="{x(p[0]):.1f}" cy="{y(p[index]):.1f}" r="2.2"/>' for p in points]
    label = f"{escape(kind)}: relative error by layer"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _value(value: Any) -> str:
    """A short HTML form of any JSON value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(k))} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value)
    return escape(str(value))


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _library(target: str, entry: Json) -> str:
    check = entry["verification"]
    if not check["ran"]:
        verified = f'<span class="soft">not run: {escape(str(check["reason"]))}</span>'
    elif "kernels" in check:
        words = f"{check['kernels']} kernels in {check['launches']} launches: each within its bound of the reference"
        style = "good" if check["passed"] else "bad"
        verified = f'<span class="{style}">{escape(words)}</span>'
    else:
        words = f"every logit within {check['at_most']:g} of torch's on the same weights, over {check['tokens']} tokens"
        style = "good" if check["passed"] else "bad"
        verified = f'<span class="{style}">{escape(words)}</span> (allowed: {check["tolerance"]:g})'
    facts = [
        ["file", f"<code>{escape(entry['path'])}</code>"],
        ["TVM target", f"<code>{_value(entry['tvm_target'])}</code>"],
        ["verification", verified],
    ]
    content = _pairs(facts)
    kernels = entry.get("kernels") or []
    if kernels:
        head = list(dict.fromkeys(key for kernel in kernels for key in kernel))
        rows = [[f"<code>{_value(kernel.get(key, ''))}</code>" for key in head] for kernel in kernels]
        content += _details(f"{len(kernels)} kernels of quantised linears", _table(head, rows, set()))
    memory = entry.get("memory_usage") or {}
    if memory:
        rows = [[f"<code>{escape(str(name))}</code>", _megabytes(value)] for name, value in memory.items()]
        content += _details("Working memory by function", _table(["function", "bytes"], rows, {1}))
    return _section(f"Library for {target}", "", content)


def _provenance(report: Json) -> str:
    rows = [[escape(f"{package}"), escape(str(version))] for package, version in report["versions"].items()]
    rows += [[escape(str(key)), _value(value)] for key, value in report["options"].items()]
    if report["calibration"]:
        rows.append(["calibration", _value(report["calibration"])])
    return _section("Made with", "", _pairs(rows))
