"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

QUANT = "Quantisation"
LIMITS = "Limits of the compiled model"
GENERAL = "General"

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.", rich_help_panel=GENERAL),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks.", rich_help_panel=GENERAL)
]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="Bits, group, order and head in one word: w4g128, w3g64a, w4g32-h8, w4g32kn; or MLC's q4f16_1, q4f16_0.",
        rich_help_panel=QUANT,
        show_default="the target's",
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits of a weight: 3, 4 or 8.", rich_help_panel=QUANT)]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128.", rich_help_panel=QUANT)
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Store a zero point per group.", rich_help_panel=QUANT)]
HeadBits = Annotated[
    int | None,
    typer.Option(help="Bits of embedding and LM head: 16, 8 or 4.", rich_help_panel=QUANT, show_default="16"),
]
Method = Annotated[
    str, typer.Option(help="awq, or rtn to round to nearest without calibration.", rich_help_panel=QUANT)
]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Calibration text: plain or JSON lines.",
        rich_help_panel=QUANT,
        show_default="a bundled text",
    ),
]
CalibSamples = Annotated[int | None, typer.Option(help="Windows of calibration text.", rich_help_panel=QUANT)]
CalibLength = Annotated[int | None, typer.Option(help="Tokens in each window.", rich_help_panel=QUANT)]
MAX_SEED = (1 << 32) - 1  # the most that every generator takes
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Which windows are drawn.", rich_help_panel=QUANT)]
Library = Annotated[
    str | None,
    typer.Option("--target", "-t", metavar="TARGET", help="Which library of DIST.", show_default="one that runs here"),
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to measure on.", show_default="a bundled text")
]
