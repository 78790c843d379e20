"""reliability: what is proved at night, part by part, into docs/reliability/scorecard.json.

    python tools/reliability.py [--python PYTHON]... [PART...]

Each part runs tests on more cases than CI does, or tools/versions.py with each PYTHON, and takes
the place of its earlier outcome: what passed and failed, what the tests have counted themselves,
seconds, commit. Without a part named all run. `make tables` brings them into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCORECARD = ROOT / "docs" / "reliability" / "scorecard.json"
VERSIONS = "versions"
# Part -> its tests, and the variables that make them try more than in CI.
PARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "fuzz": (["tests/test_fuzz.py", "--hypothesis-profile=nightly"], {}),
    "repeats": (["tests/test_repeatable.py"], {}),
    "kernels": (["tests/test_cuda_sources.py"], {}),
    "sanitizers": (["tests/test_sanitizers.py"], {}),
    "leaks": (["tests/test_leaks.py", "tests/test_workers.py"], {"FASTRES_CALLS": "10000"}),
    "kills": (["tests/test_survival.py"], {"FASTRES_KILLS": "200"}),
    "damage": (["tests/test_damage.py"], {"FASTRES_DAMAGES": "500"}),
    "denied": (["tests/test_denied.py"], {}),
    "code": (["tests/test_no_code.py", "tests/test_formats.py"], {}),
    VERSIONS: ([], {}),
}


def counted(suite: ET.Element) -> dict[str, int]:
    """Sum up what tests that passed have counted: own properties, and calls of hypothesis."""
    counts: Counter[str] = Counter()
    for case in suite.findall("testcase"):
        if case.find("failure") is None:
            for entry in case.findall("properties/property"):
                counts[entry.attrib["name"]] += int(entry.attrib["value"])
    for entry in suite.findall("properties/property"):
        text = base64.b64decode(entry.attrib["value"]).decode()
        if found := re.search(r"(\d+) passing, (\d+) failing", text):
            calls = sum(map(int, found.groups()))
            counts["random calls"] += calls
            counts["fewest of a test"] = min(counts["fewest of a test"] or calls, calls)
    return dict(counts)


def outcome(report: Path) -> dict[str, Any]:
    """Read what a run of pytest has left."""
    (suite,) = ET.parse(report).getroot()
    results, failures = Counter(passed=0, failed=0, skipped=0), []
    for case in suite.findall("testcase"):
        kinds = {child.tag for child in case}
        failed = bool(kinds & {"failure", "error"})
        results["failed" if failed else "skipped" if "skipped" in kinds else "passed"] += 1
        if failed:
            failures.append(case.attrib["name"])
    return {**results, "failures": failures, "counts": counted(suite)}


def run_tests(name: str) -> dict[str, Any]:
    """Run the tests of a part."""
    arguments, more = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-o", "junit_family=xunit1", "-o", "timeout=3600", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}).returncode
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0, "failures": ["pytest"], "counts": {}}
        found = outcome(report)
    if code and not found["failed"]:  # such as a file of tests that is not there
        found |= {"failed": 1, "failures": [f"pytest ended with {code}"]}
    return found


def run_versions(pythons: list[str]) -> dict[str, Any]:
    """Build, install and test under each Python and torch; an entry for each beside the counts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "versions.json")
        command = [sys.executable, "tools/versions.py", "--out", str(report), *pythons]
        code = subprocess.run(command, cwd=ROOT).returncode
        entries = json.loads(report.read_text()) if report.exists() else []
    wrong = [f"{e['python']} {e['torch']}".strip() for e in entries if "error" in e or e["failed"]]
    if code and not wrong:
        wrong = ["tools/versions.py"]
    counts = {
        "installed without a compiler": sum("installed" in e for e in entries),
        "tests passed": sum(e.get("passed", 0) for e in entries),
    }
    passed = len(entries) - len(wrong) if entries else 0
    results = {"passed": passed, "failed": len(wrong), "skipped": 0, "failures": wrong}
    return {**results, "counts": counts, "entries": entries}


def main() -> int:
    """Run the parts that the command line names, and keep their outcomes; 1 if any failed."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import machine
    from fastres.files import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--python", action="append", help="for versions; again for each")
    given = parser.parse_args()
    for name in set(given.parts) - set(PARTS):
        parser.error(f"parts must be of {', '.join(PARTS)}, got {name}")
    failed = False
    for name in given.parts or PARTS:
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        pythons = given.python or [sys.executable]
        found = run_versions(pythons) if name == VERSIONS else run_tests(name)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found |= {"seconds": round(time.monotonic() - began), "cpu_seconds": round(used)}
        found |= {"device": machine.describe(torch.device("cpu")), "commit": machine.commit()}
        found |= {"versions": machine.versions()}
        known = json.loads(SCORECARD.read_text()) if SCORECARD.exists() else {}
        known[name] = found
        SCORECARD.parent.mkdir(exist_ok=True)
        ordered = {part: known[part] for part in PARTS if part in known}
        write(SCORECARD, json.dumps(ordered, indent=1) + "\n")
        print(
            f"reliability: {name}: {found['passed']} passed, {found['failed']} failed", flush=True
        )
        failed |= bool(found["failed"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
