"""info: what is loaded, what is not, why, and the command that mends it.

python -m fastres.info [--json] [--require cpu|cuda]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from fastres.ops import native

VARIABLES = {  # that fastres honours -> what they are for
    "FASTRES_BUILD": "installing: auto, require or skip the compiled library",
    "FASTRES_CUDA": "installing: auto, 1 (require) or 0 (skip) the CUDA library",
    "FASTRES_CUDA_ARCHS": "installing: compute capabilities, such as 80,90",
    "CUDA_HOME": "installing: the CUDA toolkit",
    "CXX": "installing: the C++ compiler",
    "FASTRES_ISA": "running: portable, avx2 or avx512 at most",
    "FASTRES_MLP_STACK": "running: layers or persistent, the CUDA kernels of mlp_stack",
    "FASTRES_CONV_STACK": "running: layers, the CUDA kernels of conv_stack that take every shape",
    "FASTRES_DATA": "running: folder of MNIST and CIFAR-10",
    "FASTRES_TRACEBACK": "running: tracebacks of the command line's errors",
}
REQUIRED = {"cpu": ("_C",), "cuda": ("_C", "_C_cuda")}


class Library(TypedDict):
    """One compiled library: the facts if it is loaded, else why not and what mends that."""

    loaded: bool
    facts: dict[str, str]
    reason: str
    fix: str


class Info(TypedDict):
    """All that `fastres.info` tells."""

    versions: dict[str, str]
    libraries: dict[str, Library]  # _C, _C_cuda
    devices: dict[str, str]  # device -> name, or why there is none
    extras: dict[str, list[str]]  # extra -> packages that it lacks
    variables: dict[str, str]  # those that are set


def collect() -> Info:
    """Return what this installation of fastres has and lacks."""
    cores = os.cpu_count()
    return {
        "versions": {
            "fastres": _version(),
            "python": f"{platform.python_version()} ({sys.executable})",
            "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
            "system": f"{platform.system()} {platform.machine()}, {cores} cores",
        },
        "libraries": {"_C": _cpu(), "_C_cuda": _cuda()},
        "devices": _devices(),
        "extras": {extra: _lacking(names) for extra, names in _extras().items()},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version() -> str:
    from fastres import __version__

    return f"{__version__} ({Path(__file__).parent})"


def _checkout() -> Path | None:
    """The checkout that this is imported from; None where fastres is installed."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "setup.py").exists() and (root / "csrc").exists() else None


def _build(variables: str) -> str:
    """The command that builds the libraries for this Python."""
    if root := _checkout():
        return f"cd {root} && {variables} {sys.executable} setup.py build_ext --inplace"
    origin = importlib.metadata.distribution("fastres").read_text("direct_url.json") or "{}"
    folder = json.loads(origin).get("url", "fastres").removeprefix("file://")
    return f"{variables} {sys.executable} -m pip install --force-reinstall --no-deps {folder}"


def _cpu() -> Library:
    if native.C is None:
        compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if any(map(shutil.which, compilers)):
            return _absent("_C", "FASTRES_BUILD=require")
        install = "install a C++ compiler (apt install g++)"
        return _absent("_C", "FASTRES_BUILD=require", "no C++ compiler", install)
    built = native.C.build_info()
    abi = int(built["torch_abi_target"], 16)
    oldest = f"{abi >> 56}.{abi >> 48 & 255}"
    return _present(
        {
            "file": native.C.__file__,
            "compiler": f"{built['compiler']}, C++{built['cxx_standard'] // 100 % 100}",
            "instructions": f"{built['isa_in_use']}, of {' '.join(built['isas_built'])}",
            "torch": f"built with {built['built_with_torch']}, runs on {oldest} and later",
        }
    )


def _cuda() -> Library:
    if "_C_cuda" not in native.missing:
        archs = native.C.build_info()["cuda_archs"].split()
        facts = {"built for": " ".join(f"sm_{arch}" for arch in archs)}
        if torch.cuda.is_available():
            facts["mlp_stack"] = _whole_stacks()
            facts["conv_stack"] = _whole_stages()
        return _present(facts)
    if torch.version.cuda is None:
        install = "install a torch with CUDA"
        reason = f"torch {torch.__version__} has no CUDA"
        return _absent("_C_cuda", "FASTRES_CUDA=1", reason, install)
    if not _nvcc():
        install = f"install the CUDA toolkit {torch.version.cuda}, set CUDA_HOME"
        return _absent("_C_cuda", "FASTRES_CUDA=1", "no nvcc", install)
    return _absent("_C_cuda", "FASTRES_CUDA=1")


def _whole_stacks() -> str:
    """Up to which D = H the current GPU takes a whole stack in one launch, by dtype."""
    persistent, found = native.raw("_mlp_stack_persistent"), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fit = [
            width
            for width in range(16, 1025, 16)
            if persistent(torch.empty(1024, width, dtype=dtype, device="cuda"), width, False)
        ]
        found.append(f"{max(fit, default=0)} {str(dtype).removeprefix('torch.')}")
    return f"one launch up to D = H = {', '.join(found)}; else layer by layer"


def _whole_stages() -> str:
    """Which stages of networks for CIFAR the current GPU takes in one launch, by dtype."""
    resident, found = native.raw("_conv_stack_resident"), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fit = [
            f"{channels}x{side}x{side}"
            for channels, side in ((16, 32), (32, 16), (64, 8))
            if resident(torch.empty(1, channels, side, side, dtype=dtype, device="cuda"), True)
        ]
        name = str(dtype).removeprefix("torch.").replace("float32", "tf32")
        found.append(f"{name} {' '.join(fit) or 'none'}")
    return f"one launch for {', '.join(found)}; else layer by layer"


def _present(facts: dict[str, str]) -> Library:
    return {"loaded": True, "facts": facts, "reason": "", "fix": ""}


def _absent(name: str, variable: str, *lacking: str) -> Library:
    """Why a library is not loaded; lacking: what it could not be built without, and the mend."""
    reason, fix = native.missing[name], _build(variable)
    if not list(Path(__file__).parent.glob(f"{name}.*so")):
        reason = ": ".join(["not built", *lacking[:1]])
        fix = "; ".join([*lacking[1:], fix])
    return {"loaded": False, "facts": {}, "reason": reason, "fix": fix}


def _nvcc() -> str | None:
    homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    folders = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads"}
    if torch.version.cuda is None:
        found["cuda"] = "none: torch has no CUDA"
    elif not torch.cuda.is_available():
        found["cuda"] = "none: torch sees no NVIDIA GPU or driver"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return found


def _extras() -> dict[str, list[str]]:
    """Extra -> names of its packages, from the installed metadata or, in a checkout, pyproject."""
    if root := _checkout():
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        given = {k: list(v) for k, v in project["optional-dependencies"].items()}
    else:
        given = {}
        for line in importlib.metadata.requires("fastres") or ():
            if found := re.match(r"(.+?);.*extra == ['\"](\w+)['\"]", line):
                given.setdefault(found[2], []).append(found[1])
    pattern = re.compile(r"[\w.-]+")
    return {extra: [pattern.findall(line)[0] for line in lines] for extra, lines in given.items()}


def _lacking(names: list[str]) -> list[str]:
    return [name for name in names if name != "fastres" and not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def text(info: Info) -> str:
    """Return info as lines for people."""
    lines = [f"{name:10}{value}" for name, value in info["versions"].items()]
    for name, library in info["libraries"].items():
        lines += ["", f"{name:10}{'loaded' if library['loaded'] else 'NOT LOADED'}"]
        rows = library["facts"] or {"why": library["reason"], "mend": library["fix"]}
        lines += [f"  {key:14}{value}" for key, value in rows.items()]
    lines += ["", "devices"] + [f"  {name:14}{what}" for name, what in info["devices"].items()]
    lines += ["", "extras"]
    for extra, lacking in info["extras"].items():
        mend = f"lacks {', '.join(lacking)}: {sys.executable} -m pip install {' '.join(lacking)}"
        lines.append(f"  {extra:14}{mend if lacking else 'complete'}")
    lines += ["", "variables"]
    for name, what in VARIABLES.items():
        lines.append(f"  {name:20}{info['variables'].get(name, '-'):10} {what}")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> int:
    """Print what is loaded, what is not, and why.

    Args:
        argv: Arguments of the command line; none by default.

    Returns:
        0, or 1 if what --require names is not there.
    """
    parser = argparse.ArgumentParser(
        prog="fastres.info", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--require", choices=REQUIRED, help="fail unless its kernels run")
    given = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=1) if given.json else text(info))
    for name, library in info["libraries"].items():
        if name in REQUIRED.get(given.require, ()) and not library["loaded"]:
            print(f"fastres: {name} is not loaded: {library['reason']}", file=sys.stderr)
            return 1
    if given.require == "cuda" and not torch.cuda.is_available():
        print(f"fastres: no GPU: {info['devices']['cuda']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
