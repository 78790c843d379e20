"""Build the package with an instrumented CPU library, beside the one that is in use."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_on_cpu.build import COMPILER, ROOT, of_setup, run

HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "sanitize"
ISA_FLAGS: dict[str, list[str]] = of_setup("ISA_FLAGS")
ROOMS = sorted(path.parent.name for path in ROOT.glob("csrc/*/op.cpp"))
# Use after scope is not looked for: it takes six times as long to compile. The C++ run-time library
# comes first, as Python has none, and the sanitizers want to know where its exceptions are thrown.
# Nor bounds: gcc 12 looks at the subscript of a vector before it is set. ASan has those of arrays.
SANITIZERS = {
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-fno-sanitize-address-use-after-scope",
        "-fno-sanitize=bounds",
    ],
    # A tile is copied by memcpy, of which TSan sees a call, and nothing where gcc writes it out.
    "thread": ["-fsanitize=thread", "-fno-builtin-memcpy"],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
# CPython and torch keep what they allocate.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": f"halt_on_error=1 suppressions='{HERE / 'not_ours.tsan'}'"},
}
FLAGS = ["-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# What runs torch's compilers or another process: none of our C++, and minutes under a sanitizer.
# What counts roundings, which are others where nothing is multiplied and added at once; what counts
# bytes, of which a sanitizer takes its own; and what forks: TSan bears no threads there.
NOT_OURS = (
    *("compile", "export", "opcheck", "spawn", "subprocess"),
    *("no_less_exact", "every_size_and_option", "memory_is_at_most"),
)
NOT_OURS_OF = {"address": NOT_OURS, "thread": (*NOT_OURS, "fork")}


def why_not(kind: str) -> str | None:
    """Return why there is no such sanitizer here, or None where there is."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    if "clang" in COMPILER:
        return "clang has run-time libraries of its own, which are not looked for"
    path = Path(run([COMPILER, f"-print-file-name={RUNTIME[kind]}"]).strip())
    return None if path.is_absolute() else f"{COMPILER} has no {path}"


def environment(kind: str, package: Path) -> dict[str, str]:
    """Return the environment in which Python imports the package and runs its library."""
    names = (RUNTIME[kind], "libstdc++.so.6")
    paths = [run([COMPILER, f"-print-file-name={name}"]).strip() for name in names]
    folders = f"{package}{os.pathsep}{HERE.parent}"
    given = {"LD_PRELOAD": " ".join(paths), "PYTHONPATH": folders, "PYTHONSAFEPATH": "1"}
    # What torch's own threads do is not seen: one is enough. Ours are those of threads.cpp.
    return {**os.environ, **OPTIONS[kind], **given, "OMP_NUM_THREADS": "1"}


def compile_once(source: Path, flags: list[str], inputs: list[Path]) -> Path:
    """Compile a source for each state of it and of its inputs once; return the object."""
    digest = hashlib.sha256(" ".join([run([COMPILER, "--version"]), *flags]).encode())
    for path in [source, *sorted(inputs)]:
        digest.update(path.read_bytes())
    name = "-".join(source.relative_to(ROOT).with_suffix("").parts[1:])
    made = FOLDER / "objects" / f"{name}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        run([COMPILER, *flags, "-c", str(source), "-o", str(partial)])
        partial.replace(made)
    return made


def torch_flags(kind: str) -> list[str]:
    """Return what a source that sees torch's headers is compiled with."""
    from torch.utils.cpp_extension import include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    defined = [f'-DFASTRES_COMPILER="sanitized: {kind}"', "-DFASTRES_BUILT_WITH_TORCH=0"]
    defined += ["-DFASTRES_CUDA_ARCHS=", f"-DTORCH_TARGET_VERSION={2 << 56 | 11 << 48:#x}"]
    return ["-std=c++20", *includes, f"-I{sysconfig.get_path('include')}", *defined]


def module_of(kind: str) -> tuple[Path, list[Path]]:
    """Write all that sees torch's headers as one source, so that they are read once."""
    parts = [ROOT / "csrc/module.cpp", *(ROOT / "csrc" / room / "op.cpp" for room in ROOMS)]
    parts += [HERE / "faults.cpp", *([HERE / "threads.cpp"] if kind == "thread" else [])]
    module = FOLDER / f"{kind}.cpp"
    FOLDER.mkdir(parents=True, exist_ok=True)
    module.write_text("".join(f'#include "{part}"\n' for part in parts))
    return module, parts


def package(kind: str, rooms: list[str] = ROOMS, *, short: bool = False) -> Path:
    """Build fastres with an instrumented library; return the folder it is in.

    Of all rooms but `rooms` the kernels are not instrumented. short: compile little, and one
    instruction set only.
    """
    flags = [*FLAGS, *SANITIZERS[kind], *(["-O0", "-DFASTRES_ONE_ISA"] if short else [])]
    module, parts = module_of(kind)
    headers = [*ROOT.glob("csrc/**/*.h")]
    jobs = [(module, [*flags, *torch_flags(kind)], [*headers, *parts])]
    # The linker takes the first of equal inline functions: those of instrumented rooms. Were it
    # another one, no sanitizer would see what threads wait for in it.
    for room in sorted(ROOMS, key=lambda room: room not in rooms):
        near = [path for path in headers if path.parent.name in ("common", room)]
        chosen = flags if room in rooms else [*FLAGS, "-O0", "-DFASTRES_ONE_ISA"]
        for isa in ["portable"] if short else ISA_FLAGS:
            options = ["-std=c++17", *chosen, f"-DFASTRES_ISA={isa}", *ISA_FLAGS[isa]]
            jobs.append((ROOT / "csrc" / room / "cpu.cpp", options, near))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: compile_once(*job), jobs))
    return link(kind, objects)


def link(kind: str, objects: list[Path]) -> Path:
    """Put the library beside a copy of the package's Python files."""
    from torch.utils.cpp_extension import library_paths

    digest = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    folder = FOLDER / f"{kind}-{digest}"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastres", folder / "fastres", ignore=ignored, dirs_exist_ok=True)
    made = folder / "fastres" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists():
        libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
        # symbolic: threads.cpp stands before torch
        command = [COMPILER, "-shared", "-Wl,-Bsymbolic-functions", *SANITIZERS[kind]]
        run([*command, *map(str, objects), *libraries, "-o", str(made)])
    return folder


def main() -> None:
    """Build all, call all and run the operators' tests; what a sanitizer finds is an error."""
    for kind in sys.argv[1:]:
        if why_not(kind):
            raise SystemExit(f"sanitize: {why_not(kind)}")
        made = package(kind)
        amx = ["amx"] if "amx_bf16" in Path("/proc/cpuinfo").read_text() else []
        for isa in [*ISA_FLAGS, *amx]:
            command = [sys.executable, "-m", "sanitizing.calls", kind, "all"]
            given = {**environment(kind, made), "FASTRES_ISA": isa}
            subprocess.run(command, cwd=HERE.parent, env=given, check=True)
        names = [*ROOMS, "mlp_stack_few", "fuzz", "repeatable", "workers"]
        tests = [f"test_{name}.py" for name in names]
        ours = f"not ({' or '.join(NOT_OURS_OF[kind])})"
        command = [sys.executable, "-m", "pytest", "-q", "-k", ours]
        # Not --capture=fd: a sanitizer ends the process, and its report would go with it.
        command += ["--capture=sys", "--timeout=3600", *tests]
        subprocess.run(command, cwd=HERE.parent, env=environment(kind, made), check=True)


if __name__ == "__main__":
    main()
