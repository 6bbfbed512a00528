"""report.html is one page that needs nothing else, and nothing in the report can break out of it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from awq_compile.report import render_html

EVIL = "<script>alert('x')</script>\"&"
REPORT: dict[str, Any] = {
    "model": "tiny",
    "architecture": "LlamaForCausalLM",
    "layers": 2,
    "hidden_size": 128,
    "vocab_size": 4096,
    "scheme": "w4g128",
    "method": "awq",
    "calibration": {"source": "bundled", "samples": 64},
    "sizes": {
        "weights": 1000,
        "parameter_bytes": 600,
        "float16_bytes": 2000,
        "bits_per_weight": 4.8,
        "linear_weights": 900,
        "linear_bits_per_weight": 4.125,
    },
    "linears": [
        {
            "name": f"model.layers.{layer}.self_attn.{kind}.weight",
            "shape": [128, 128],
            "spec": "w4g128",
            "rtn_error": 0.1 + layer / 100,
            "error": 0.08,
            "kind": "duo",
            "ratio": 0.35,
            "clipped": 0.1,
            "refined": False,
            "kept": "awq",
            "note": "",
        }
        for layer in range(2)
        for kind in ("q_proj", "o_proj")
    ],
    "libraries": {
        "cpu": {
            "path": "lib/tiny.so",
            "nbytes": 1_000_000,
            "tvm_target": {"kind": "llvm", "mattr": ["+avx2"]},
            "verification": {"ran": True, "passed": True, "tokens": 48, "at_most": 1e-5, "tolerance": 2e-3},
            "kernels": [{"kernel": "qmatmul", "rows": "gemv", "schedule": "lanes=8", "source": "rule"}],
            "memory_usage": {"decode": 1024},
        }
    },
    "evaluation": {
        "text": "heldout.txt",
        "window": 512,
        "windows": 10,
        "rows": [
            {"name": "original", "label": "original", "perplexity": 10.0, "kl": 0.0},
            {"name": "library", "label": "compiled library", "perplexity": 10.1, "kl": 0.01},
        ],
    },
    "options": {"method": "awq"},
    "versions": {"awq-compile": "0.1.0"},
}


class Page(HTMLParser):
    """Collects tags, and checks that they nest."""

    VOID = ("meta", "line", "circle", "polyline", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href") or name[:2] == "on"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone() -> None:
    """Well nested, no script, no link, no address of anything elsewhere."""
    text = render_html(REPORT)
    page = Page(text)
    assert page.values == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert page.tags.count("svg") == 2  # one panel for each kind of linear
    for words in ("10.1000", "+1.00%", "compiled library", "lanes=8", "within 1e-05", "-20.0%"):
        assert words in text


def strings(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every string in the report."""
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in strings(item, (*path, key))]
    if isinstance(value, list):
        return [p for index, item in enumerate(value) for p in strings(item, (*path, index))]
    return [path] if isinstance(value, str) else []


@pytest.mark.parametrize("path", strings(REPORT), ids=lambda path: ".".join(map(str, path)))
def test_every_string_is_escaped(path: tuple[Any, ...]) -> None:
    """Markup in any string of the report stays text."""
    report = copy.deepcopy(REPORT)
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = EVIL if path[-1] != "name" else f"model.layers.0.{EVIL}.weight"
    text = render_html(report)
    assert "<script" not in text
    Page(text)


def test_what_is_missing_is_left_out() -> None:
    """No evaluation, nothing calibrated, a library that did not run here: still a page."""
    report = copy.deepcopy(REPORT)
    report["evaluation"] = None
    report["method"] = "rtn"
    report["linears"] = []
    report["libraries"]["cpu"]["verification"] = {"ran": False, "reason": "another machine"}
    text = render_html(report)
    Page(text)
    assert "another machine" in text and "Perplexity" not in text


def test_equal_reports_give_equal_pages() -> None:
    """The page depends on the report alone."""
    assert render_html(copy.deepcopy(REPORT)) == render_html(REPORT)
