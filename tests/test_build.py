"""Building: what cannot be built leaves the rest whole; what must be built fails in one line."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Extension
from setuptools.dist import Distribution

ROOT = Path(__file__).parent.parent
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fastres", "csrc")
NO_CXX = {"CXX": "/bin/false"}

sys.path.insert(0, str(ROOT / "tools"))
environment = pytest.importorskip("environment")


@pytest.fixture
def setup(tmp_path):
    """Run the setup.py of a copy without libraries, in an environment made of few variables."""
    copy = tmp_path / "fastres"
    copy.mkdir()
    for part in filter(Path.exists, (ROOT / part for part in PARTS)):
        to = copy / part.name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(part, to, ignore=ignore) if part.is_dir() else shutil.copy(part, to)

    def run(*arguments, **variables):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = [sys.executable, "setup.py", *arguments]
        return subprocess.run(
            command, cwd=copy, env=kept | variables, capture_output=True, text=True, check=False
        )

    run.folder = copy
    return run


def wheel_of(done, folder):
    """The one wheel in dist, and what lies in it."""
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("dist/*.whl")
    return path.name, zipfile.ZipFile(path).namelist()


@pytest.mark.parametrize("variables", [NO_CXX, {"FASTRES_BUILD": "skip"}])
def test_without_compiler_or_will_the_wheel_is_pure_python(setup, variables):
    done = setup("bdist_wheel", **variables)
    name, files = wheel_of(done, setup.folder)
    assert name.endswith("-py3-none-any.whl")
    assert {"fastres/py.typed", "fastres/_C.pyi", "fastres/ops/residual_add.py"} <= set(files)
    assert not [file for file in files if file.endswith(".so")]
    why = "fastres: installs as pure Python: the C++ compiler /bin/false does not work\n"
    assert (why in done.stderr) == (variables is NO_CXX)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no c++")
def test_a_compiler_that_fails_late_leaves_a_pure_wheel_without_older_libraries(setup, tmp_path):
    late = tmp_path / "late"
    late.write_text(
        '#!/bin/sh\ncase "$*" in *-fsyntax-only*|*--version*) exec c++ "$@";; esac\nexit 1\n'
    )
    late.chmod(0o755)
    folder = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/fastres"
    older = setup.folder / folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.parent.mkdir(parents=True)
    older.touch()
    done = setup("bdist_wheel", CXX=str(late), FASTRES_CUDA="0")
    name, files = wheel_of(done, setup.folder)
    assert "fastres: installs as pure Python: the native build failed" in done.stderr
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]


@pytest.fixture
def fake_torch(tmp_path):
    """Make a torch that is imported instead of the one that is installed."""

    def make(source):
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake/torch.py").write_text(source)
        return {"PYTHONPATH": str(tmp_path / "fake")}

    return make


@pytest.mark.parametrize(
    ("torch_source", "reason"),
    [
        ("raise OSError('libcudart.so: missing')", r"torch cannot .* \(libcudart.so: missing\);"),
        ("__version__ = '2.10.1+cpu'", r"torch must be 2.11 or later, got 2.10.1\+cpu"),
    ],
)
def test_a_torch_that_does_not_serve_is_named(setup, fake_torch, torch_source, reason):
    done = setup("build_ext", FASTRES_BUILD="require", **fake_torch(torch_source))
    assert done.returncode == 1
    assert re.fullmatch(rf"fastres: cannot build: {reason}.*\n", done.stderr)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FASTRES_BUILD": "require"} | NO_CXX, "cannot build: the C++ compiler /bin/false does"),
        ({"FASTRES_CUDA": "1"} | NO_CXX, "cannot build: the C++ compiler /bin/false does not work"),
        ({"FASTRES_BUILD": "require", "CXX": "/no/c++"}, "cannot build: no C++ compiler"),
        ({"FASTRES_BUILD": "yes"}, "FASTRES_BUILD must be auto|require|skip, got yes"),
        ({"FASTRES_CUDA": "2"}, "FASTRES_CUDA must be auto|1|0, got 2"),
        ({"FASTRES_CUDA_ARCHS": "hopper"}, "FASTRES_CUDA_ARCHS must be numbers such as 80,90, got"),
    ],
)
def test_what_is_required_and_cannot_be_fails_in_one_line(setup, variables, reason):
    done = setup("build_ext", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fastres: {reason}")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_the_cuda_library_is_refused_on_a_torch_without_cuda(setup):
    done = setup("build_ext", FASTRES_CUDA="1")
    assert done.returncode == 1
    assert done.stderr.startswith("fastres: cannot build _C_cuda: torch ")
    assert done.stderr.endswith(" has no CUDA\n")


def test_commands_that_compile_nothing_say_nothing(setup):
    done = setup("--version", **NO_CXX, FASTRES_BUILD="require")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_source_archive_has_all_that_is_compiled(setup):
    assert setup("sdist", **NO_CXX).returncode == 0
    (path,) = setup.folder.glob("dist/*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources | {"setup.py", "LICENSE", "fastres/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]


class FakeBuild:
    """Stands for torch's BuildExtension; builds nothing, and fails at CUDA."""

    def __init__(self):
        libraries = [Extension("fastres._C", []), Extension("fastres._C_cuda", [])]
        self.distribution = Distribution({"ext_modules": libraries})
        self.extensions, self.build_temp, self.built = libraries, "", []

    def compile_kernels(self):
        return []

    def run(self):
        self.build_extensions()

    def build_extensions(self):
        for library in self.extensions:
            if "cuda" in library.name:
                raise RuntimeError("nvcc does not know gcc 99\nand more")
            self.built.append(library.name)


def build_command(cuda):
    defined = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    command = defined["build_command"](FakeBuild, "require", cuda)
    command.compile_kernels = FakeBuild.compile_kernels
    return command()


@pytest.fixture
def nothing_to_do(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])


def test_a_failing_cuda_build_does_not_lose_the_cpu_library(nothing_to_do, capsys):
    build = build_command("auto")
    build.run()
    assert [library.name for library in build.extensions] == ["fastres._C"]
    assert "fastres: _C_cuda is not built: nvcc does not know gcc 99\n" in capsys.readouterr().err


def test_a_failing_cuda_build_that_is_required_fails(nothing_to_do):
    with pytest.raises(SystemExit, match=r"the native build failed: nvcc does not know gcc 99$"):
        build_command("1").run()


def test_extras_are_installed_without_the_package_and_without_another_torch():
    names = environment.requirements(["dev"])
    assert {"pytest", "tqdm", "torchvision", "ruff"} <= {re.split(r"\W", name)[0] for name in names}
    assert not [name for name in names if re.match(r"(fastres|torch)\b(?!vision)", name)]
    with pytest.raises(SystemExit, match=r"environment: .* got tets"):
        environment.requirements(["tets"])


def test_the_environment_keeps_a_torch_that_serves(monkeypatch):
    installed = []
    monkeypatch.setattr(environment, "install", lambda *wanted: installed.append(wanted))
    monkeypatch.setattr(sys, "argv", ["environment.py", "--torch", "torch==9.9", "demo"])
    environment.main()
    (wanted,) = installed
    assert wanted[0] == f"torch=={torch.__version__}"
