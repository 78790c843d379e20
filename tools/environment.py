"""environment: installs what the Makefile needs, and leaves a torch that is there as it is.

    python tools/environment.py [--torch REQUIREMENT] build|EXTRA...

`build` stands for what setup.py needs, an EXTRA for one of pyproject.toml. Where all is there pip
asks no network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

OLDEST = (2, 11)  # of torch
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def torch_version() -> str | None:
    """Return the version of the torch that can be imported; None without one or if too old."""
    if importlib.util.find_spec("torch") is None:
        return None
    version = importlib.metadata.version("torch")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return version if numbers >= OLDEST else None


def requirements(extras: Iterable[str]) -> set[str]:
    """Return what building and the extras need, but for torch and for the package itself.

    Example:
        >>> sorted(requirements(["build"]))
        ['ninja', 'numpy', 'setuptools>=64']
    """
    import tomllib  # not yet in the Pythons that main refuses

    given = tomllib.loads(PYPROJECT.read_text())
    project, found = given["project"], {"ninja", *given["build-system"]["requires"]}
    open_extras = set(extras) - {"build"}
    for extra in open_extras - set(project["optional-dependencies"]):
        raise SystemExit(f"environment: an extra of pyproject.toml is wanted, got {extra}")
    wanted = [*project["dependencies"]]
    for extra in open_extras:
        wanted += project["optional-dependencies"][extra]
    for requirement in wanted:
        if own := re.fullmatch(rf"{project['name']}\[([\w,]+)\]", requirement):
            found |= requirements(own[1].split(","))
        elif re.split(r"\W", requirement)[0] != "torch":
            found.add(requirement)
    return found


def install(*wanted: str) -> None:
    """Let pip install; of what it says only errors are seen, and they end this program."""
    if importlib.util.find_spec("pip") is None:  # uv makes environments without it
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    print(f"+ pip install {shlex.join(wanted)}", flush=True)
    if code := subprocess.run([*command, *wanted]).returncode:
        raise SystemExit(code)


def main() -> None:
    """Install torch if there is none, then the rest beside exactly that torch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="+", metavar="build|EXTRA")
    parser.add_argument("--torch", default="torch", help="pip's arguments where none is there")
    given = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (an active environment may be older)
        raise SystemExit(f"fastres: Python must be 3.11 or later, got {sys.version.split()[0]}")
    if torch_version() is None:
        install(*shlex.split(given.torch))
        importlib.invalidate_caches()
    # Named with its version, so that no package (torchvision) brings another torch.
    install(f"torch=={torch_version()}", *sorted(requirements(given.extras)))


if __name__ == "__main__":
    main()
