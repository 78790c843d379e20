"""versions: a wheel per Python, installed where there is no compiler, tested under each torch.

    python tools/versions.py --out FILE [--wheel WHEEL]... PYTHON...

Each PYTHON is that of an environment with torch 2.11 or later, the tests' packages and, in the
first one of its version, setuptools and ninja. None of them is changed: a wheel is installed into
an empty environment of its own, which sees the other one's packages. A WHEEL that is given is taken
for its Python, and none is built. FILE gets a JSON list, one entry for each PYTHON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = (
    "residual_add", "batch_norm_residual", "mlp_stack", "conv_stack", "mlp_stack_paths",
    "path_accumulate",
)  # fmt: skip
TESTS = [*OPERATORS, "record", "fuse"]
FACTS = """
import json, platform, sysconfig, numpy, torch
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "numpy": numpy.__version__, "packages": sysconfig.get_path("purelib")}))
"""
# What is installed is used: an operator of the library, a policy, the module behind the demo.
USE = """
import json, torch, fastres, fastres.cli, fastres.studies.demo
from fastres.ops import native
assert native.C is not None, native.missing
x = torch.randn(4, 8)
y, stats = fastres.residual_add(x, x)
assert torch.equal(y, x + x)
built_with = native.C.build_info()["built_with_torch"]
print(json.dumps({"package": fastres.__file__, "built_with": built_with}))
"""


def output(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command, and return what it printed; an error shows the end of it."""
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def without_compilers() -> dict[str, str]:
    """Return an environment in which nothing can be compiled."""
    empty = {"PATH": "/nowhere", "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    return {"HOME": os.environ.get("HOME", "/"), **empty}


def build(python: str, folder: Path) -> Path:
    """Build a wheel with the CPU library for the Python of an environment."""
    env = {**os.environ, "FASTRES_BUILD": "require", "FASTRES_CUDA": "0"}
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    output(python, "-m", "pip", "wheel", *options, str(ROOT), env=env)
    (wheel,) = folder.glob("fastres-*.whl")
    return wheel


def digest(wheel: Path) -> str:
    """Hash the library in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"fastres/_C\..*\.so", n))
        return hashlib.sha256(archive.read(name)).hexdigest()[:16]


def install(python: str, packages: str, wheel: Path, folder: Path) -> str:
    """Install a wheel, where there is no compiler, beside the packages of an environment."""
    env, own = without_compilers(), folder / "bin" / "python"
    output(python, "-m", "venv", "--without-pip", str(folder), env=env)
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    output(python, "-m", "pip", "--python", str(own), "install", *options, env=env)
    own_packages = json.loads(output(str(own), "-c", "import json, sysconfig; print(json.dumps("
                                     "sysconfig.get_path('purelib')))"))  # fmt: skip
    Path(own_packages, "beside.pth").write_text(packages)
    return str(own)


def test(python: str, folder: Path) -> dict[str, int]:
    """Run the tests of operators, record and fuse on what is installed; returns counts."""
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    report = folder / "report.xml"
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-m", "pytest", *options, *files], cwd=folder, env=env,
        capture_output=True, text=True,
    )  # fmt: skip
    if not report.exists():
        raise RuntimeError(f"pytest: {(done.stdout + done.stderr)[-2000:]}")
    (suite,) = ET.parse(report).getroot()
    counts = {what: int(suite.attrib[what]) for what in ("tests", "failures", "errors", "skipped")}
    if counts["failures"] or counts["errors"]:
        print(done.stdout[-6000:], file=sys.stderr)
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {
        "passed": passed,
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
    }


def entry(python: str, wheels: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Install, use and test the wheel for an environment, built if it is not among those."""
    began = time.monotonic()
    found: dict[str, Any] = {"python": python, "torch": "", "numpy": "", "library": ""}
    try:
        facts = json.loads(output(python, "-c", FACTS))
        found |= {key: facts[key] for key in ("python", "torch", "numpy")}
        version = facts["python"].rpartition(".")[0]
        if version not in wheels:
            wheels[version] = build(python, folder / "wheel")
        found["library"] = digest(wheels[version])
        own = install(python, facts["packages"], wheels[version], folder / "env")
        used = json.loads(output(own, "-c", USE, env=without_compilers()))
        if not used["package"].startswith(str(folder)):
            raise RuntimeError(f"fastres must come from the wheel, got {used['package']}")
        found |= {"built_with": used["built_with"], "installed": True, **test(own, folder)}
    except (OSError, RuntimeError) as error:
        found |= {"error": str(error)}
    return found | {"seconds": round(time.monotonic() - began)}


def main() -> int:
    """Build, install and test; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the outcome")
    parser.add_argument("--wheel", type=Path, action="append", default=[])
    given = parser.parse_args()
    wheels = {re.sub(r".*-cp(\d)(\d+)-.*", r"\1.\2", w.name): w.resolve() for w in given.wheel}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for number, python in enumerate(given.pythons):
            found.append(entry(python, wheels, Path(name, str(number))))
            print(json.dumps(found[-1]), flush=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("error" in one or one["failed"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
