"""Build CUDA sources for the CPU, where the threads of a block are fibers."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX", "g++")

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE}"]
# Libraries in one process keep their options apart; clang's do.
FLAGS += [] if "clang" in COMPILER else ["-fno-gnu-unique"]
# Without optimisation: a third of the time to compile, and to run the little that there is.
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OWN_TYPES = ["-DCUDA_ON_CPU_OWN_TYPES"]


def why_not() -> str | None:
    """Return why kernels cannot run on this machine's CPU, or None where they can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"fibers switch stacks on x86-64 only, not on {platform.machine()}"
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    if "clang" in COMPILER:
        return "clang does not link all that the kernels leave open"
    return None


def run(command: list[str]) -> str:
    """Run a command; an error shows what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def of_setup(name: str) -> Any:
    """Return a list or table of setup.py, by its name."""
    for line in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return ast.literal_eval(line.value)
    raise KeyError(name)


@functools.cache
def toolkit() -> list[str]:
    """Return the flags for the CUDA toolkit's headers, or for our own types where there is none."""
    if shutil.which("nvcc") is None:
        return OWN_TYPES
    dryrun = run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    found = re.search(r'INCLUDES="-I([^"]*)"', dryrun)
    return ["-isystem", found.group(1).strip()] if found else OWN_TYPES


def library(sources: list[Path], flags: list[str]) -> Path:
    """Compile sources to a shared library, once for each state of them and of all headers."""
    headers = [*ROOT.glob("csrc/**/*.h"), *HERE.glob("*.h")]
    digest = hashlib.sha256(" ".join([run([COMPILER, "--version"]), *FLAGS, *flags]).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    made = ROOT / "build" / "cuda_on_cpu" / f"{sources[0].parent.name}-{digest.hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        inputs = [argument for source in sources for argument in ("-x", "c++", str(source))]
        run([COMPILER, *FLAGS, *flags, "-shared", *inputs, "-o", str(partial)])
        partial.replace(made)
    return made


@functools.cache
def sanitizer() -> str | None:
    """Return the address sanitizer's run-time library, or None where the compiler has none."""
    path = run([COMPILER, "-print-file-name=libasan.so"]).strip()
    return path if Path(path).is_absolute() else None


def sanitizer_environment() -> dict[str, str]:
    """Return the environment in which Python can load a library built with SANITIZE."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": str(sanitizer()), **options}
