"""The device that gave a time."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """`kind` is `cpu` or `gpu`; `driver` its version, `units` its cores or multiprocessors."""

    name: str
    kind: str
    driver: str
    units: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name} ({self.units} units, {self.driver})"

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:60] or "device"
