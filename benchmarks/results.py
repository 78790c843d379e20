"""results: the result files, one JSON per device and benchmark, and their rows on the terminal.

A file holds what `empty` lists; a row what `ROW` lists. Seconds are per call of the variant,
`gb_per_s` counts the case's own bytes whatever the variant moves, `fraction` is the time of the
limit over the time of the variant, `ratio` is the variant's time over fastres's (above 1: fastres
is faster) and `predicted` what the bytes alone say that it should be. Where a forward pass keeps
something for its backward pass a row also has `saved_bytes`.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.case import OURS, Case, Protocol

FOLDER = Path(__file__).parent / "results"
FILE = {
    "name", "device", "versions", "system", "date", "commit",
    "protocol", "limits", "rows", "goals", "not_measured",
}  # fmt: skip
ROW = {
    "threads", "case", "shape", "layout", "dtype", "headline", "cached", "clock", "variant",
    "limit", "median_s", "q1", "q3", "samples", "inner", "ratio", "bytes", "flops", "gb_per_s",
    "fraction", "predicted",
}  # fmt: skip
AT_MOST = ("seconds", "saved")  # goals that are met by what is smaller


def empty(name: str, environment: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Return a report without rows."""
    lists: dict[str, Any] = {"limits": [], "rows": [], "goals": [], "not_measured": []}
    return {"name": name, **environment, "protocol": asdict(protocol), **lists}


def save(report: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a report to folder/<device>/<name>.json, whole or not at all."""
    path: Path = folder / report["device"]["slug"] / f"{report['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    head = json.dumps({**report, "rows": []}, indent=1)
    text = head.replace('"rows": []', f'"rows": [\n{rows}\n ]' if rows else '"rows": []') + "\n"
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.chmod(partial, 0o644)
    os.replace(partial, path)
    return path


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read every report in the folder, ordered by device and benchmark."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def miss(report: dict[str, Any], case: Case, clock: str, variant: str, reason: str) -> None:
    """Note that a variant was not measured in a case, and why."""
    title = f"{case.title}, {clock}"
    for entry in report["not_measured"]:
        if (entry["variant"], entry["reason"]) == (variant, reason):
            entry["cases"] += [title] if title not in entry["cases"] else []
            return
    report["not_measured"].append({"variant": variant, "reason": reason, "cases": [title]})


def judge(
    report: dict[str, Any], case: Case, clock: str, threads: int, rows: list[dict[str, Any]]
) -> None:
    """Compare the case's goals with its rows, and add the outcome to the report."""
    if case.judged not in ("", clock):
        return
    by = {row["variant"]: row for row in rows}
    for what, goal in case.goals.items():
        if what in ("limit", "seconds"):
            value = by.get(OURS, {}).get("fraction" if what == "limit" else "median_s")
        elif what == "saved":
            value = saved_of_eager(rows)
        else:  # the strongest of the variants that the goal names
            found = [row["ratio"] for name, row in by.items() if name.startswith(what)]
            value = min(found, default=None)
        if value is not None:
            met = value <= goal if what in AT_MOST else value >= goal
            report["goals"].append({
                "case": case.title, "clock": clock, "threads": threads,
                "against": what, "goal": goal, "measured": value, "met": met,
            })  # fmt: skip


def saved_of_eager(rows: list[dict[str, Any]]) -> float | None:
    """Return what fastres keeps for its backward pass as a part of what eager keeps."""
    saved = {row["variant"]: row["saved_bytes"] for row in rows if "saved_bytes" in row}
    return saved[OURS] / saved["eager"] if {OURS, "eager"} <= saved.keys() else None


def verdict(report: dict[str, Any]) -> None:
    """Print each goal beside what was measured."""
    for goal in report["goals"]:
        wanted = f"at {'most' if goal['against'] in AT_MOST else 'least'} {goal['goal']:.3g}"
        overhead = ""
        if goal["against"] not in ("limit", *AT_MOST) and goal["goal"] < 1:
            over, most = 1 / goal["measured"] - 1, 1 / goal["goal"] - 1
            overhead = f" ({over:+.1%} of at most {most:.0%})"
        print(
            f"goal {'met   ' if goal['met'] else 'MISSED'} {goal['against']:10} {wanted}, measured "
            f"{goal['measured']:.3g}{overhead}: "
            f"{goal['case']} ({goal['clock']}, {goal['threads']} threads)"
        )


def show(case: Case, clock: str, threads: int, rows: list[dict[str, Any]]) -> None:
    """Print a case: time and spread, rate, fraction of the limit, ratio beside the prediction."""
    print(f"\n{case.title} ({clock}, {threads} threads)")
    print(f"  {'variant':26}      median  spread     GB/s GFLOP/s  limit   ratio   bytes     saved")
    for row in rows:
        spread = (row["q3"] - row["q1"]) / row["median_s"]
        bound = row["fraction"] and not (row["limit"] and row["fraction"] > 1)  # else by products
        share = f"{row['fraction']:.0%}" if bound else "-"
        rate = "-" if row["limit"] else f"{row['flops'] / row['median_s'] / 1e9:.1f}"
        saved = f"{row['saved_bytes'] / 1e6:.1f} MB" if "saved_bytes" in row else "-"
        predicted = f"{row['predicted']:.2f}" if row["predicted"] else "-"
        print(f"  {row['variant']:26}{row['median_s'] * 1e6:>9.1f} us{spread:>8.0%}"
              f"{row['gb_per_s']:>9.1f}{rate:>8}{share:>7}{row['ratio']:>8.2f}{predicted:>8}"
              f"{saved:>10}")  # fmt: skip
