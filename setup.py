"""setup: builds the CPU library _C, and _C_cuda where nvcc is; else the package is pure Python.

FASTRES_BUILD=auto|require|skip   _C: auto goes without it where it cannot be built, and says why
FASTRES_CUDA=auto|1|0             _C_cuda: auto goes without it likewise, 1 fails, 0 does not try
FASTRES_CUDA_ARCHS=80,90          compute capabilities; the last one is kept as PTX too
MAX_JOBS                          compilers at once; by default one per core, 2 GiB each
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH = (2, 11)  # the oldest that the binaries run on
COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}  # those that compile
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# No -std: what sees torch's headers takes the one that BuildExtension knows its torch to need.
CXX_FLAGS = [  # gcc 12 warns of optionals and of its own intrinsics without reason, clang of no-*
    *("-O3", "-g0", "-fvisibility=hidden"),
    *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    f"-DTORCH_TARGET_VERSION={TORCH[0] << 56 | TORCH[1] << 48:#018x}",
]
KERNEL_FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-psabi"]  # these see none


class UnavailableError(Exception):
    """A library that cannot be built here, and why."""


def say(text):
    print(f"fastres: {text}", file=sys.stderr)


def stop(text):
    raise SystemExit(f"fastres: {text}")


def setting(name, *allowed):
    value = os.environ.get(name) or allowed[0]
    return value if value in allowed else stop(f"{name} must be {'|'.join(allowed)}, got {value}")


def cuda_archs():
    """["8.0", "9.0"] of "80,90"."""
    given = os.environ.get("FASTRES_CUDA_ARCHS") or "80,90"
    found = [re.fullmatch(r"(\d+)\.?(\d[af]?)", arch.strip()) for arch in given.split(",")]
    if not all(found):
        stop(f"FASTRES_CUDA_ARCHS must be numbers such as 80,90, got {given!r}")
    return [".".join(arch.groups()) for arch in found]


def sources(*names):
    """The files of these names in every room, relative as setuptools wants them."""
    return [str(p.relative_to(ROOT)) for name in names for p in sorted(ROOT.glob(f"csrc/*/{name}"))]


def target_folders():
    """Where the environment that is installed into keeps its packages.

    Build isolation hides them but not where they are: the prefix is still that environment's.
    """
    config = Path(sys.prefix, "pyvenv.cfg")
    shares = config.exists() and "include-system-site-packages = true" in config.read_text()
    for base in [sys.prefix, sys.base_prefix] if shares else [sys.prefix]:
        for kind in ("purelib", "platlib"):
            yield sysconfig.get_path(kind, vars={"base": base, "platbase": base})
    yield site.getusersitepackages()


def import_torch():
    """Import the torch that the libraries are for."""
    try:
        if not importlib.util.find_spec("torch"):
            for folder in target_folders():
                site.addsitedir(folder)
        import torch
    except Exception as error:  # an OSError where one of its libraries is missing
        raise UnavailableError(f"torch cannot be imported ({error}); install it first") from error
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < TORCH:
        raise UnavailableError(
            f"torch must be {TORCH[0]}.{TORCH[1]} or later, got {torch.__version__}"
        )
    return torch


def find_compiler():
    """Set CXX to a compiler that works and return its name and version."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [c for c in commands if shutil.which(shlex.split(c)[0])]
    if not found:
        raise UnavailableError(f"no C++ compiler (looked for {', '.join(commands)}); install g++")
    os.environ["CXX"] = found[0]
    check = [*shlex.split(found[0]), f"-I{sysconfig.get_path('include')}", "-x", "c++"]
    program = "#include <Python.h>\n#include <optional>\n"
    done = subprocess.run(
        [*check, "-fsyntax-only", "-"], input=program, capture_output=True, text=True
    )
    if "Python.h" in done.stderr:
        raise UnavailableError("Python.h is missing; install Python's headers (python3-dev)")
    if done.returncode:
        raise UnavailableError(
            f"the C++ compiler {found[0]} does not work {done.stderr[:200]}".strip()
        )
    version = [*shlex.split(found[0]), "--version"]
    return subprocess.run(version, capture_output=True, text=True).stdout.split("\n")[0]


def find_cuda_home():
    """The toolkit with nvcc, header and runtime library: an nvcc on PATH may be a wrapper."""
    nvcc = shutil.which("nvcc")
    real = nvcc and Path(nvcc).resolve().parents[1]
    for home in map(Path, filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda", real))):
        runtime = [*home.glob("lib*/libcudart.so*"), *home.glob("targets/*/lib/libcudart.so*")]
        if runtime and all((home / f).exists() for f in ("bin/nvcc", "include/cuda_runtime.h")):
            return str(home)
    raise UnavailableError("no CUDA toolkit was found (set CUDA_HOME)")


def cpu_library(torch, compiler, archs):
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastres._C",
        ["csrc/module.cpp", *sources("op.cpp")],
        define_macros=[
            ("FASTRES_COMPILER", f'"{compiler}"'),
            ("FASTRES_BUILT_WITH_TORCH", torch.__version__),
            ("FASTRES_CUDA_ARCHS", " ".join(archs).replace(".", "")),
        ],
        depends=["setup.py", *sources("*.*")],
        extra_compile_args=CXX_FLAGS,
    )


def cuda_library(torch, archs):
    if torch.version.cuda is None:
        raise UnavailableError(f"torch {torch.__version__} has no CUDA")
    os.environ["CUDA_HOME"] = find_cuda_home()  # read when cpp_extension is imported
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "fastres._C_cuda",
        sources("cuda.cu", "op.cpp"),
        define_macros=[("FASTRES_CUDA", None), ("USE_CUDA", None)],
        depends=["setup.py", *sources("*.*")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-lineinfo"]},
    )


def build_command(base, build, cuda):
    """The command build_ext, on torch's."""

    class Build(base):
        """Compiles cpu.cpp once per instruction set; what may fail leaves the rest whole."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                reason = f"the native build failed: {str(error).splitlines()[0]:.200}"
                if build == "require" or cuda == "1":
                    raise SystemExit(f"fastres: {reason}") from error
                say(f"installs as pure Python: {reason}")
                self.become_pure()

        def become_pure(self):
            for library in self.extensions:  # of an earlier build
                Path(self.get_ext_fullpath(library.name)).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True

        def build_extensions(self):
            cpu, *built_cuda = self.extensions
            cpu.extra_objects = self.compile_kernels()
            self.extensions = [cpu]
            super().build_extensions()
            try:
                self.extensions = built_cuda
                super().build_extensions()
            except Exception as error:
                if cuda == "1":
                    raise
                say(f"_C_cuda is not built: {str(error).splitlines()[0]:.200}")
                built_cuda = []
            self.extensions = [cpu, *built_cuda]

        def build_extension(self, ext):
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def compile_kernels(self):
            isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else ["portable"]
            with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                jobs = product(isas, sources("cpu.cpp"))
                return list(pool.map(lambda job: self.compile_kernel(*job), jobs))

        def compile_kernel(self, isa, source):
            """Compile one cpu.cpp for one instruction set, unless its object is up to date."""
            folder = os.path.join(self.build_temp, isa)
            (target,) = self.compiler.object_filenames([source], output_dir=folder)
            rooms = Path(source).parent, ROOT / "csrc/common"
            inputs = [ROOT / "setup.py", *(path for room in rooms for path in room.iterdir())]
            newest = max(path.stat().st_mtime for path in inputs)
            if not os.path.exists(target) or os.path.getmtime(target) <= newest:
                self.compiler.compile(
                    [source],
                    output_dir=folder,
                    macros=[("FASTRES_ISA", isa)],
                    extra_postargs=[*CXX_FLAGS, *KERNEL_FLAGS, *ISA_FLAGS[isa]],
                )
            return target

    return Build


def native():
    """What setup() needs to build the libraries; nothing for a pure-Python package."""
    build = setting("FASTRES_BUILD", "auto", "require", "skip")
    cuda = setting("FASTRES_CUDA", "auto", "1", "0")
    if build == "skip" or not COMMANDS & set(sys.argv):
        return {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 31  # of 2 GiB
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("MAX_JOBS", str(max(1, min(cores or 1, memory))))
    libraries, archs = [], cuda_archs()
    try:
        compiler, torch = find_compiler(), import_torch()
    except UnavailableError as reason:
        if build == "require" or cuda == "1":
            stop(f"cannot build: {reason}")
        say(f"installs as pure Python: {reason}")
        return {}
    try:
        if cuda != "0":
            libraries.append(cuda_library(torch, archs))
    except UnavailableError as reason:
        if cuda == "1":
            stop(f"cannot build _C_cuda: {reason}")
        say(f"_C_cuda is not built: {reason}")
    from torch.utils.cpp_extension import BuildExtension

    libraries.insert(0, cpu_library(torch, compiler, archs if libraries else []))
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": build_command(BuildExtension, build, cuda)},
    }


setup(license="BSD-3-Clause", **native())
