"""claims: what a paper says beside what was measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastres import report


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, and whether the measurement agrees; None: it was not measured."""

    about: str
    paper: str
    measured: str
    agrees: bool | None


def text(claims: Sequence[Claim]) -> str:
    """Lay out claims for a terminal, a line each."""
    words = {True: "yes", False: "no", None: ""}
    rows = [(c.about, c.paper, c.measured, words[c.agrees]) for c in claims]
    return report.table(("", "paper says", "measured here", "agrees"), rows)
