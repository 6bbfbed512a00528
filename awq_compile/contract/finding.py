"""What the checker reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One way in which a DIST breaks the contract (an error), or may break it (a warning).

    `code` is for programs; `where` names the file and the key, function or symbol in it; `fix` is what to do.
    """

    code: str
    where: str
    expected: str
    found: str
    fix: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}"

    def to_json(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return asdict(self)
