"""Schedules by others, measured beside ours: TVM's dlight rules, and traces that MetaSchedule found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from awq_compile.errors import CompileError
from awq_compile.tuning.templates import Schedule, decode_schedule, describe_schedule, encode_schedule


@dataclass(frozen=True)
class Dlight:
    """The first rule of dlight that takes the unscheduled reference, for the target's kind."""


@dataclass(frozen=True)
class Trace:
    """A trace of TVM's schedule primitives, as JSON, applied to the unscheduled reference at fixed M."""

    trace: str


Candidate = Schedule | Dlight | Trace


def encode_candidate(candidate: Candidate) -> dict[str, Any]:
    """A schedule of ours or by others as a JSON object."""
    if isinstance(candidate, Dlight):
        return {"template": "dlight"}
    if isinstance(candidate, Trace):
        return {"template": "trace", "trace": candidate.trace}
    return encode_schedule(candidate)


def decode_candidate(data: Mapping[str, Any]) -> Candidate:
    """Inverse of `encode_candidate`. Raises `CompileError`."""
    if not isinstance(data, Mapping):
        raise CompileError(f"a schedule is a JSON object, not {data!r:.60}")
    if data.get("template") == "dlight":
        return Dlight()
    if data.get("template") == "trace":
        return Trace(str(data.get("trace")))
    return decode_schedule(data)


def describe(candidate: Candidate) -> str:
    """For people."""
    if isinstance(candidate, Dlight):
        return "dlight's rule"
    return "a trace of MetaSchedule" if isinstance(candidate, Trace) else describe_schedule(candidate)
