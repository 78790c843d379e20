"""Build fastres: the CPU library _C, and _C_cuda where nvcc is; pure Python where neither can be built.

FASTRES_BUILD=auto|require|skip   auto falls back to pure Python and says why; require fails instead
FASTRES_CUDA=auto|1|0             auto builds _C_cuda where torch has CUDA and the toolkit is found
FASTRES_CUDA_ARCHS=80,90          compute capabilities; the last one is kept as PTX too
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
BUILD = os.environ.get("FASTRES_BUILD", "auto")
CUDA = os.environ.get("FASTRES_CUDA", "auto")
ARCHS = os.environ.get("FASTRES_CUDA_ARCHS", "80,90").split(",")
TORCH_ABI = "0x020b000000000000"  # 2.11: one binary for it and every later torch
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
CXX_FLAGS = [  # gcc 12 warns of optionals and of its own intrinsics without reason
    *("-O3", "-g0", "-fvisibility=hidden", "-Wno-maybe-uninitialized"),
    f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
]
KERNEL_FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-psabi"]


class Unavailable(Exception):
    """A library that cannot be built here, and why."""


def say(text):
    print(f"fastres: {text}", file=sys.stderr)


def find_cuda_home():
    """The toolkit that has both header and runtime library: nvcc on PATH may be a wrapper."""
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]):
        if home and (Path(home) / "include/cuda_runtime.h").exists() and (Path(home) / "bin/nvcc").exists():
            return str(home)
    raise Unavailable("no CUDA toolkit was found (set CUDA_HOME)")


def find_torch():
    """Import the torch of the environment that is installed into, also under build isolation."""
    try:
        import torch
    except ImportError:
        site = sysconfig.get_path("purelib")
        sys.path.append(site)  # pip isolates by hiding it; the prefix is still that of the target
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"torch cannot be imported ({error}); install it first") from error
    return torch


def compiler_name():
    command = os.environ.get("CXX", "c++").split()
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    except OSError as error:
        raise Unavailable(f"no C++ compiler ({error}); set CXX") from error


def cuda_extension(torch):
    """The CUDA library, or why not."""
    if CUDA == "0":
        raise Unavailable("FASTRES_CUDA=0")
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} has no CUDA")
    os.environ["CUDA_HOME"] = find_cuda_home()
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a[:-1]}.{a[-1]}" for a in ARCHS) + "+PTX"
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "fastres._C_cuda",
        [str(p.relative_to(ROOT)) for room in ("cuda.cu", "op.cpp") for p in sorted(ROOT.glob(f"csrc/*/{room}"))],
        define_macros=[("FASTRES_CUDA", None), ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-lineinfo"]},
    )


def extensions():
    """The libraries to build here, and the command that builds them."""
    torch = find_torch()
    compiler = compiler_name()
    built_cuda = []
    try:
        built_cuda.append(cuda_extension(torch))
    except Unavailable as reason:
        if CUDA == "1":
            raise
        say(f"_C_cuda is not built: {reason}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "fastres._C",
        [str(p.relative_to(ROOT)) for p in [ROOT / "csrc/module.cpp", *sorted(ROOT.glob("csrc/*/op.cpp"))]],
        define_macros=[
            ("FASTRES_COMPILER", f'"{compiler}"'),
            ("FASTRES_BUILT_WITH_TORCH", torch.__version__),
            ("FASTRES_CUDA_ARCHS", " ".join(ARCHS) if built_cuda else ""),
        ],
        extra_compile_args=CXX_FLAGS,
    )
    return [cpu, *built_cuda], build_command(BuildExtension)


def build_command(base):
    class Build(base):
        """Compiles cpu.cpp once per instruction set, and keeps the objects of the libraries apart."""

        def build_extensions(self):
            isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
            sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cpu.cpp"))
            self.extensions[0].extra_objects = [
                obj
                for isa, flags in isas.items()
                for obj in self.compiler.compile(
                    sources,
                    output_dir=os.path.join(self.build_temp, isa),
                    macros=[("FASTRES_ISA", isa)],
                    extra_postargs=[*CXX_FLAGS, *KERNEL_FLAGS, *flags],
                )
            ]
            super().build_extensions()

        def build_extension(self, ext):
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "require":
                    raise
                say(f"the native build failed, so this installs as pure Python: {error!r:.300}")
                self.extensions = self.distribution.ext_modules = []

        def get_outputs(self):
            return super().get_outputs() if self.extensions else []

    return Build


def native():
    """What setup() needs to build the libraries; nothing for a pure-Python package."""
    if BUILD == "skip":
        return {}
    try:
        libraries, command = extensions()
    except Unavailable as reason:
        if BUILD == "require" or CUDA == "1":
            raise SystemExit(f"fastres: cannot build: {reason}") from reason
        say(f"installs as pure Python: {reason}")
        return {}
    return {"ext_modules": libraries, "cmdclass": {"build_ext": command}}


setup(**native())
