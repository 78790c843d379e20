"""machine: the device that a benchmark runs on, its name and caches, and the versions in use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def slug(model: str, cores: int | None = None) -> str:
    """Turn a processor's model name into a folder name.

    Example:
        >>> slug("Intel(R) Xeon(R) Processor @ 2.50GHz", 2)
        'intel-xeon-2.5ghz-2-cores'
        >>> slug("NVIDIA H200")
        'nvidia-h200'
    """
    name = re.sub(r"\((r|tm)\)|@|\b(processor|cpu|\d+-core)\b", " ", model.lower())
    name = re.sub(r"(\d\.\d*?)0+ghz", r"\1ghz", name).replace(".ghz", "ghz")
    name = re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")
    return f"{name}-{cores}-cores" if cores else name


def cpu_model() -> str:
    """Return the processor's model name as the system gives it."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return the device's kind, name, slug and last-level cache in bytes."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts = {"kind": "cuda", "name": found.name, "slug": slug(found.name)}
        return {**facts, "multiprocessors": found.multi_processor_count, "cache": cache(device)}
    cores = len(cpus())
    facts = {"kind": "cpu", "name": cpu_model(), "slug": slug(cpu_model(), cores)}
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    simd = torch.backends.cpu.get_cpu_capability() + amx
    return {**facts, "cores": cores, "simd": simd, "cache": cache(device)}


def cpus() -> set[int]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cache(device: torch.device) -> int:
    """Return the size of the last-level cache in bytes; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes, default=32 << 20)


def hold_memory() -> str:
    """Make malloc keep what is freed, and return a sentence that says so.

    Otherwise each large output is mapped, zeroed and unmapped again in every call, and all
    variants would be timed on the kernel's page faults.
    """
    if platform.libc_ver()[0] != "glibc":
        return "the system's malloc as it is"
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return "freed memory is kept by malloc, for every variant" if kept else "malloc as it is"


def commit() -> str | None:
    """Return the short commit of the checkout, `-dirty` if measured sources differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", "fastres", "csrc", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, Any]:
    """Return the versions a result depends on, and what the compiled library says of itself."""
    import fastres

    found: dict[str, Any] = {
        "fastres": fastres.__version__, "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "build": build_info(),
    }  # fmt: skip
    for name in ("numpy", "triton", "torchvision", "liger_kernel", "flash_attn", "apex"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def build_info() -> dict[str, Any] | None:
    """Return fastres._C.build_info() in plain types, or None where the library is not built."""
    try:
        from fastres import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return {key: _plain(value) for key, value in dict(_C.build_info()).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def environment(device: torch.device, source: str | None = None) -> dict[str, Any]:
    """Return what a result file says about where it comes from; `source` overrides the commit."""
    return {
        "device": describe(device), "versions": versions(), "system": platform.system(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": source or commit(),
    }  # fmt: skip
