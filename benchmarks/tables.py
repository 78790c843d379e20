"""tables: writes the Markdown tables of README.md and docs/*.md from the committed result files.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `<!-- table: NAME all -->` has
every case on every device; else it has those cases that the benchmark calls headline, on the CPU
and the GPU that were measured last. `<!-- table: demo -->`, and those named after a study, have
what was printed, from docs/demo/report.json, docs/paths/report.json and so on;
`<!-- table: reliability -->` has docs/reliability/scorecard.json. Run `python -m benchmarks.tables`
to rewrite them, with `--check` to fail where one is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import results, scorecard
from benchmarks.case import OURS
from benchmarks.machine import ROOT

MARKED = re.compile(r"(<!-- table: (\w+)( all)? -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {"cpu": "a CPU", "cuda": "a GPU"}
KEY = ("case", "shape", "layout", "dtype", "threads", "clock")
Report = dict[str, Any]
Row = dict[str, Any]


def group(variant: str) -> str:
    """Return the column of a variant: of eager and of compiled forms the fastest is shown.

    Example:
        >>> group("eager in place"), group("eager, recorded")
        ('eager', 'eager, recorded')
    """
    first = variant.split()[0]
    return first if first.startswith(("eager", "compile")) and first[-1] != "," else variant


def seconds(value: float) -> str:
    """Write seconds with a unit and three digits.

    Example:
        >>> seconds(0.00001234), seconds(0.0567), seconds(0.9998)
        ('12.3 us', '56.7 ms', '1.00 s')
    """
    value = float(f"{value:.3g}")
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            digits = f"{value * scale:#.3g}" if value * scale < 1000 else f"{value * scale:.0f}"
            return f"{digits.rstrip('.')} {unit}"
    raise AssertionError


def table(report: Report, everything: bool) -> str:
    """Return the Markdown table of one report: a line per case, a column per alternative."""
    rows = [row for row in report["rows"] if everything or row["headline"]]
    by_case: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_case.setdefault(tuple(str(row[key]) for key in KEY), []).append(row)
    others = {row["variant"]: None for row in rows if not row["limit"] and row["variant"] != OURS}
    columns = list(dict.fromkeys(group(name) for name in others))
    rate = ""
    if any(row["bytes"] for row in rows):
        reads = any(row["variant"].startswith("limit: read") for row in rows)
        rate = "GFLOP/s" if reads else "GB/s"
    saved = any("saved_bytes" in row for row in rows)
    gpu = report["device"]["kind"] == "cuda"
    head = ["case", "shape", "dtype", "timed by" if gpu else "threads", "fastres"]
    head += [rate, "of copy" if rate == "GB/s" else "of limit"] * bool(rate)
    head += [f"{name}, ratio" for name in columns] + ["saved, of eager"] * saved
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for found in by_case.values():
        lines.append("| " + " | ".join(_cells(found, columns, rate, gpu, saved)) + " |")
    return "\n".join(lines)


def _cells(found: list[Row], columns: list[str], rate: str, gpu: bool, saved: bool) -> list[str]:
    """Return the cells of one case."""
    ours = next(row for row in found if row["variant"] == OURS)
    layout = "" if ours["layout"] == "contiguous" else f" {ours['layout']}"
    cells = [ours["case"], f"{ours['shape']}{layout}", ours["dtype"]]
    cells += [ours["clock"] if gpu else str(ours["threads"]), seconds(ours["median_s"])]
    if rate:
        moved = ours["bytes"] > 0
        value = ours["gb_per_s"] if rate == "GB/s" else ours["flops"] / ours["median_s"] / 1e9
        cells.append(f"{value:.1f}" if moved else "")
        cells.append(f"{ours['fraction']:.0%}" if moved and ours["fraction"] else "")
    for name in columns:
        ratios = [row["ratio"] for row in found if group(row["variant"]) == name]
        cells.append(f"{min(ratios):.2f}x" if ratios else "")
    if saved:
        part = results.saved_of_eager(found)
        cells.append(f"{part:.1%}" if part is not None else "")
    return cells


def caption(report: Report) -> str:
    """Return the line that says where a table comes from, and what could not be measured."""
    device, versions = report["device"], report["versions"]
    cores = f", {device['cores']} cores, {device['simd']}" if device["kind"] == "cpu" else ""
    text = (
        f"{device['name']}{cores}; torch {versions['torch']}, commit {report['commit']}, "
        f"{report['date']}. Medians of interleaved runs; a ratio is the time of the alternative "
        f"over that of fastres (of several eager or compiled forms, the fastest)."
    )
    missing = {
        f"{entry['variant']} ({entry['reason']})"
        for entry in report["not_measured"]
        if "is not installed" in entry["reason"]
    }
    return text + (f" Not measured: {', '.join(sorted(missing))}." if missing else "")


# Folder in docs -> what its arguments say of a run, before device and date.
STUDIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": lambda a: "",
    "hauser": lambda a: "",
    "hauser_cifar10": lambda a: "",
    "lagzi": lambda a: "",
    "li": lambda a: f"{a['data']}; {a['training']}, {len(a['rates'])} rates, {a['seeds']} seeds; ",
    "littwin_wolf": lambda a: f"{a['epochs']} epochs at the rate {a['lr']}, {a['seeds']} seeds; ",
    "paths": lambda a: (
        f"{a['network']}, images {a['images']}; {a['batches']} batches of {a['batch_size']}, "
        f"{a['draws']} draws each; "
    ),
    "veit": lambda a: f"{a['network']}, images {a['images']}; {a['draws']} draws of each size; ",
}


def study(name: str) -> str:
    """Return what a study printed when its folder in docs was made, of what, and where."""
    file = ROOT / "docs" / name.replace("_", "-") / "report.json"
    content = json.loads(file.read_text())
    module = content["arguments"]["study"].replace("-", "_")
    form = import_module(f"fastres.studies.{module}").FORM
    text, made = form.text([form.parse(row) for row in content["rows"]]), content["environment"]
    plural = "" if made["threads"] == 1 else "s"
    return (
        f"```\n{text}\n```\n\n{STUDIES[name](content['arguments'])}{made['device']}, "
        f"{made['threads']} thread{plural}, torch {made['torch']}, {made['date'][:10]}.\n"
    )


def section(name: str, everything: bool, reports: Iterable[Report]) -> str:
    """Return what stands between the markers for one name: everything, or what is newest."""
    if name == "reliability":
        return scorecard.tables()
    if name in STUDIES:
        return study(name)
    parts = []
    for kind, where in KINDS.items():
        found = [r for r in reports if r["name"] == name and r["device"]["kind"] == kind]
        newest = sorted(found, key=lambda report: report["date"])[-1:]
        for report in found if everything else newest:
            parts += [table(report, everything), caption(report)]
        if not found:
            parts.append(f"Not yet measured on {where}.")
    return "\n\n".join(parts) + "\n"


def render(text: str, reports: list[Report]) -> str:
    """Return a document with its tables made anew."""
    return MARKED.sub(lambda m: m[1] + section(m[2], bool(m[3]), reports) + m[4], text)


def documents(root: Path = ROOT) -> list[Path]:
    """Return the documents that may hold tables."""
    return [path for path in [root / "README.md", *sorted(root.glob("docs/*.md"))] if path.exists()]


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables, or check them; 1 where a check finds one that is not up to date."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    check = arguments.parse_args(argv).check
    reports = results.load()
    stale = []
    for path in documents():
        text = path.read_text()
        fresh = render(text, reports)
        if fresh != text:
            stale.append(path.name)
            if not check:
                path.write_text(fresh)
    for name in stale:
        print(f"{name}: tables {'are stale: run `make tables`' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
