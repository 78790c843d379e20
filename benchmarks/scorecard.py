"""scorecard: the tables of docs/reliability.md, of what tools/reliability.py has kept."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.machine import ROOT

FILE = ROOT / "docs" / "reliability" / "scorecard.json"
# Part -> what it proves, as the page says it.
PROMISES = {
    "fuzz": "operators are no less exact than twice eager, sums right to 1e-6, whatever the call",
    "repeats": "the same bits in 100 runs, with any number of threads, recorded or not",
    "kernels": "CUDA kernels are right on the CPU in any order of threads, planted faults found",
    "sanitizers": "no error of memory, undefined behaviour or data race in the C++ core",
    "leaks": "calls leave nothing behind; threads and worker processes do not meet",
    "kills": "kill -9 loses no finished part of a study and no kept epoch of a training",
    "damage": "a damaged file is refused by name, or does no harm",
    "denied": "full disks, read-only folders, second runs: an error by name, nothing lost",
    "code": "no file, name or path runs code",
    "versions": "one wheel per Python, installed without a compiler, runs under each torch",
}


def tables() -> str:
    """Return the scorecard, the versions and what they were made on, as Markdown."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    lines = ["| part | what holds | tried | tests | CPU time |", "|---|---|---|---|---|"]
    for name, promise in PROMISES.items():
        lines.append(f"| {name} | {promise} | {_outcome(known.get(name))} |")
    return "\n".join(lines) + "\n" + _versions(known.get("versions")) + _made_on(known)


def _outcome(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run | |"
    tried = ", ".join(f"{count:,} {what}" for what, count in sorted(found["counts"].items()))
    result = f"{found['passed']} passed"
    if found["skipped"]:
        result += f", {found['skipped']} skipped"
    if found["failed"]:
        result += f", **{found['failed']} failed**: {', '.join(found['failures'])}"
    return f"{tried} | {result} | {found['cpu_seconds'] / 60:.1f} min"


def _versions(found: dict[str, Any] | None) -> str:
    """Return a line per Python and torch; the library's hash shows which of them shared one."""
    if found is None:
        return ""
    lines = ["", "| Python | torch | library | built with | tests |", "|---|---|---|---|---|"]
    for entry in found["entries"]:
        result = entry.get("error", "").splitlines()[-1:]
        tests = f"**{result[0][:80]}**" if result else f"{entry['passed']} passed"
        tests += f", **{entry['failed']} failed**" if entry.get("failed") else ""
        cells = (entry["python"], entry["torch"], entry["library"], entry.get("built_with", ""))
        lines.append(f"| {' | '.join(cells)} | {tests} |")
    return "\n".join(lines) + "\n"


def _made_on(known: dict[str, Any]) -> str:
    """Return the lines that say where and of which commits the parts were run."""
    places: dict[str, list[str]] = {}
    for name, found in known.items():
        device, versions = found["device"], found["versions"]
        place = f"{device['name']}, torch {versions['torch']}, commit {found['commit']}"
        places.setdefault(place, []).append(name)
    return "".join(f"\n{place}: {', '.join(names)}.\n" for place, names in places.items())
