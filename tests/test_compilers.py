"""Compilers: those that are here and built nothing read the kernels of every instruction set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build

ROOT = Path(__file__).parent.parent
OLDEST = {"g++": 11, "clang++": 14}  # as docs/architecture.md says
ISAS = build.of_setup("ISA_FLAGS")


def compilers() -> list[str]:
    """Every g++ and clang++ on PATH that is not too old, but the one that builds."""
    folders = map(Path, os.environ.get("PATH", "").split(os.pathsep))
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    used = Path(shutil.which(build.COMPILER) or "").resolve()
    found = {}
    for file in files:
        named = re.fullmatch(r"(g\+\+|clang\+\+)(-\d+)?", file.name)
        if named and file.resolve() != used:
            done = subprocess.run([file, "-dumpversion"], capture_output=True, text=True)
            if done.returncode == 0 and int(done.stdout.split(".")[0]) >= OLDEST[named[1]]:
                found.setdefault(file.resolve(), str(file))
    return list(found.values())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86-64")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compiler", compilers())
def test_a_compiler_reads_the_kernels_without_an_error(compiler: str, isa: str) -> None:
    flags = [*build.of_setup("KERNEL_FLAGS"), "-w", *ISAS[isa], f"-DFASTRES_ISA={isa}"]
    sources = sorted(map(str, (ROOT / "csrc").glob("*/cpu.cpp")))
    build.run([compiler, "-fsyntax-only", *flags, *sources])
