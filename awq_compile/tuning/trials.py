"""The log of one search: what was begun, and what came out. A killed search goes on from it.

A line is written before a measurement and another after it. A candidate that was begun and has no result is not
begun again: it may be what took the machine down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from awq_compile.errors import CompileError
from awq_compile.json_input import parse_json
from awq_compile.tuning.foreign import Candidate, decode_candidate, encode_candidate
from awq_compile.tuning.measure import Measurement


class TrialLog:
    """`found`: results by candidate, in order. `begun`: candidates without a result, of a run that was killed.

    `outputs`: N at which the candidates are measured, None until `decide` is called; `final`: what `finish` was given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Candidate, Measurement] = {}
        self.begun: dict[Candidate, None] = {}
        self.outputs: int | None = None
        self.final: list[Measurement] = []
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.read_bytes() if self.path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a kill in the middle of a line leaves its beginning
        for line in whole.decode("utf-8", "replace").splitlines():
            self._read(line)
        self._file = self.path.open("r+" if self.path.exists() else "w", encoding="utf-8")
        self._file.seek(len(whole))
        self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def decide(self, outputs: int) -> int:
        """Measures candidates at N = `outputs` from now on, in later runs too."""
        self.outputs = outputs
        self._write({"outputs": outputs})
        return outputs

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """Before these are measured."""
        for candidate in candidates:
            self.begun[candidate] = None
            self._write({"begin": encode_candidate(candidate)})

    def end(self, measurement: Measurement) -> None:
        """After one is measured."""
        self._took(measurement)
        self._write(measurement.to_json())

    def finish(self, final: Sequence[Measurement]) -> None:
        """After the finalists were measured in turns."""
        self.final = list(final)
        self._write({"final": [measurement.to_json() for measurement in final]})

    def _took(self, measurement: Measurement) -> None:
        self.begun.pop(measurement.schedule, None)
        self.found[measurement.schedule] = measurement

    def _read(self, line: str) -> None:
        try:
            data: dict[str, Any] = parse_json(line)
            if "outputs" in data:
                self.outputs = int(data["outputs"])
            elif "final" in data:
                self.final = [Measurement.from_json(found) for found in data["final"]]
            elif "begin" in data:
                self.begun[decode_candidate(data["begin"])] = None
            else:
                self._took(Measurement.from_json(data))
        except (CompileError, ValueError, TypeError, AttributeError) as error:
            raise CompileError(
                f"{self.path} is damaged: {error}", hint=f"remove {self.path}: its measurements are made again"
            ) from None

    def _write(self, data: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(data, sort_keys=True) + "\n")
        self._file.flush()
