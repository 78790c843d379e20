"""gpu: builds, tests, sanitizes and measures fastres on a machine with an NVIDIA GPU, offline.

    python tools/gpu.py --out DIR [build] [test] [sanitize] [bench]

Without a part named all four run, in this order, until --minutes are over. DIR gets, flat:

    build.log            in-place build of _C and _C_cuda, both required
    test.log test.xml    the tests that need a GPU: one that skips for want of it fails
    sanitize.log         compute-sanitizer's four tools on every CUDA kernel, small shapes
    bench.log            what the CUDA benchmarks print, first of all on tiny shapes
    results.tar          their result files: unpack in benchmarks/results to commit them
    summary.json         part -> what failed and seconds; GPU, torch, driver, nvcc

It needs nvcc and a torch that sees the GPU, and nothing from the network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
SANITIZERS = ("racecheck", "memcheck", "synccheck", "initcheck")
# What decides most comes first: it may have to stop.
BENCHMARKS = (
    "residual_add", "mlp_stack", "conv_stack", "step", "mlp_stack_paths", "record",
    "batch_norm_residual", "path_accumulate", "conv_resnet", "path_gradients", "stack_hessian",
    "lesions",
)  # fmt: skip
FOUND = 86  # exit code of a sanitizer that found an error, unlike those of Python and timeout


class Part:
    """One part of the run: its log, its deadline, and what failed in it."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name, self.given, self.out = name, given, given.out
        self.log = (given.out / f"{name}.log").open("w")
        self.began = time.monotonic()
        self.failures: list[str] = []

    def left(self) -> float:
        """Return the seconds left."""
        return max(1.0, self.given.ends - time.monotonic())

    def run(
        self, what: str, *command: str, expect: int = 0, seconds: float = 1e9, **env: str
    ) -> bool:
        """Run a command into log and terminal; a failure unless it exits with `expect`."""
        self.say(f"$ {' '.join(command)}")
        began = time.monotonic()
        limit = f"{min(seconds, self.left()):.0f}"
        with subprocess.Popen(
            ["timeout", "--kill-after=10", limit, *command], cwd=ROOT, env={**os.environ, **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as process:  # fmt: skip
            for line in process.stdout or ():
                self.say(line.rstrip("\n"))
        code = process.returncode
        if code != expect:
            why = "out of time" if code in (124, 137) else f"exit code {code}, not {expect}"
            self.failures.append(f"{what}: {why}")
        ended = "as expected" if code == expect else f"FAILED ({why})"
        self.say(f"[{self.name}] {what}: {ended} after {time.monotonic() - began:.0f} s")
        return code == expect

    def say(self, line: str) -> None:
        """Write a line to the log and to the terminal."""
        print(line, flush=True)
        print(line, file=self.log, flush=True)


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit; an error where there is none."""
    found = shutil.which(name) or CUDA_HOME / "bin" / name
    if not Path(found).exists():
        raise SystemExit(f"gpu: {name} must be on PATH or in CUDA_HOME/bin, found none")
    return str(found)


def facts() -> dict[str, str]:
    """Return what this machine has; exit with what is missing if fastres's CUDA cannot run."""
    release = _output(tool("nvcc"), "--version").splitlines()
    try:
        import torch
    except ImportError:
        raise SystemExit(f"gpu: torch must be installed for {sys.executable}") from None
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU or driver"
        raise SystemExit(f"gpu: an NVIDIA GPU must be visible, but torch {torch.__version__} {why}")
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "python": sys.version.split()[0], "nvcc": release[-1] if release else "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }  # fmt: skip


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def build(part: Part) -> None:
    """Build both libraries in place, and load them."""
    part.run(
        "build", sys.executable, "setup.py", "build_ext", "--inplace",
        FASTRES_BUILD="require", FASTRES_CUDA="1", MAX_JOBS=str(os.cpu_count() or 1),
    )  # fmt: skip
    check = "import torch; from fastres.ops import native; print('not loaded:', native.missing); "
    check += "assert native.CUDA"
    part.run("load", sys.executable, "-c", check)


def test(part: Part) -> None:
    """Run the tests that need a GPU; none may skip for want of it."""
    options = ["-q", "-rfEs", "--require-cuda", f"--junitxml={part.out / 'test.xml'}"]
    options += [] if part.given.all_tests else ["--only-cuda"]
    part.run("pytest", sys.executable, "-m", "pytest", *options, "-k", part.given.tests)


def sanitize(part: Part) -> None:
    """Run compute-sanitizer's tools on every kernel; each must find a planted error first.

    initcheck watches torch's kernels too, or it would not know what they have written.
    """
    sanitizer = tool("compute-sanitizer")
    with tempfile.TemporaryDirectory() as folder:
        planted = f"{folder}/planted"
        if not part.run("planted errors", tool("nvcc"), "-o", planted, "tools/planted.cu"):
            return
        for done, name in enumerate(SANITIZERS):
            share = part.left() / (len(SANITIZERS) - done)
            check = [sanitizer, "--tool", name, "--error-exitcode", str(FOUND)]
            check += [] if name == "initcheck" else ["--kernel-name", "kernel_substring=fastres"]
            # Calls of torch's libraries may fail; our launches look at their errors themselves.
            check += ["--report-api-errors", "no"] if name == "memcheck" else []
            part.run(f"{name}, planted", *check, planted, name, expect=FOUND, seconds=60)
            # Each tensor is allocated by itself, or a write past one would hit another unseen.
            part.run(
                name, *check, "--print-limit", "20", sys.executable, "tools/sanitize.py",
                seconds=share, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip


def bench(part: Part) -> None:
    """Run the CUDA benchmarks, one after the other, and pack their result files after each."""
    given = part.given
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda"]
    part.run("tiny shapes", *command, "--smoke", PYTHONUNBUFFERED="1")
    command += ["--commit", given.commit] if given.commit else []
    command += [] if given.compile else ["--no-compile"]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.bench or BENCHMARKS:
            minutes = 0.85 * part.left() / 60
            if minutes < 0.3:
                part.failures.append(f"{name}: out of time")
                continue
            part.run(
                name, *command, name, "--out", folder, "--minutes", f"{minutes:.2f}",
                PYTHONUNBUFFERED="1",
            )  # fmt: skip
            with tarfile.open(part.out / "results.tar", "w") as tar:
                for path in sorted(Path(folder).glob("*/*.json")):
                    tar.add(path, path.relative_to(folder))


PARTS: dict[str, Callable[[Part], None]] = {
    "build": build, "test": test, "sanitize": sanitize, "bench": bench,
}  # fmt: skip


def main() -> int:
    """Run the parts that the command line names; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is produced")
    parser.add_argument("--minutes", type=float, default=60, help="limit of the whole run")
    parser.add_argument("--tests", default="", help="pytest -k expression")
    parser.add_argument("--all-tests", action="store_true", help="those that need no GPU too")
    parser.add_argument("--bench", nargs="+", default=[], help="benchmarks to run; all of them")
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile too: that takes an hour more"
    )
    parser.add_argument("--commit", help="commit of the sources where there is no git")
    given = parser.parse_args()
    for name in set(given.parts) - set(PARTS):
        parser.error(f"parts must be of {', '.join(PARTS)}, got {name}")
    given.ends = time.monotonic() + 60 * given.minutes
    machine = facts()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, object] = {"machine": machine, "parts": {}}
    failed = False
    for name in given.parts or PARTS:
        part = Part(name, given)
        PARTS[name](part)
        failed |= bool(part.failures)
        seconds = round(time.monotonic() - part.began)
        summary["parts"] |= {name: {"failures": part.failures, "seconds": seconds}}  # type: ignore[operator]
        (given.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
