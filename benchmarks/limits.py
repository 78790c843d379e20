"""limits: what a device does at best: copies and reads of a case's bytes, and a matrix product."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.case import Case, Variant
from benchmarks.clocks import Call, EventClock


def memory(case: Case, device: torch.device, threads: int) -> dict[str, Variant]:
    """Return what moves the bytes of a case and does nothing else; the fastest is the limit."""
    if not case.bytes:
        return {}
    return reads(case, device) if case.reads else copies(case, device, threads)


def reads(case: Case, device: torch.device) -> dict[str, Variant]:
    """Return the reductions that read `case.bytes`."""
    half = max(16, int(case.bytes) // 8)

    def total(*_: torch.Tensor) -> Call:
        source = torch.randn(2 * half, device=device)
        return lambda: source.sum()

    def dot(*_: torch.Tensor) -> Call:
        a, b = torch.randn(2, half, device=device)
        return lambda: torch.dot(a, b)

    found = {"sum": total, "dot": dot}
    return {
        f"limit: read, {k}": Variant(build, case.bytes, limit=True) for k, build in found.items()
    }


def copies(case: Case, device: torch.device, threads: int) -> dict[str, Variant]:
    """Return the copies that read and write `case.bytes` in all."""
    half = max(64, int(case.bytes) // 2)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        # Integers, so that negating them is a kernel that does nothing but copy.
        source = torch.randint(1, 2**31 - 1, (half // 4,), dtype=torch.int32, device=device)
        return source, torch.empty_like(source)

    def torch_copy(*_: torch.Tensor) -> Call:
        source, target = pair()
        return lambda: target.copy_(source)

    def kernel(*_: torch.Tensor) -> Call:
        source, target = pair()
        return lambda: torch.neg(source, out=target)

    def memcpy(*_: torch.Tensor) -> Call:
        return _memcpy(*pair(), threads)

    second = {"copy kernel": kernel} if device.type == "cuda" else {"memcpy": memcpy}
    found = {"copy_": torch_copy, **second}
    return {f"limit: {k}": Variant(build, case.bytes, limit=True) for k, build in found.items()}


def _memcpy(source: torch.Tensor, target: torch.Tensor, threads: int) -> Call:
    """Return a call of the C library's memcpy, split over the threads."""
    size = source.nbytes
    step = -(-size // threads // 64) * 64
    parts = [(at, min(step, size - at)) for at in range(0, size, step)]
    to, of = target.data_ptr(), source.data_ptr()
    if len(parts) == 1 or size < 1 << 20:  # below, handing it to a thread costs more than it gains
        return lambda: (ctypes.memmove(to, of, size), source, target)
    pool = ThreadPoolExecutor(len(parts) - 1)

    def call() -> None:
        others = [pool.submit(ctypes.memmove, to + at, of + at, n) for at, n in parts[1:]]
        ctypes.memmove(to, of, parts[0][1])
        for other in others:
            other.result()

    call.keep = (source, target)  # type: ignore[attr-defined]
    return call


def gemm(device: torch.device, dtype: torch.dtype, size: int, least: float) -> float:
    """Return the floating-point operations per second of the best of a few large products.

    float32 is without TF32 on a GPU. least: the seconds to go on for; a CPU may have other users.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds: list[float] = []
    while len(seconds) < 7 or sum(seconds) < least:
        if device.type == "cuda":
            seconds.append(EventClock().elapsed(lambda: torch.mm(a, b, out=out), 3) / 3)
        else:
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def peaks(device: torch.device, smoke: bool) -> dict[str, float]:
    """Measure the best matrix product, of float32 and of bfloat16, in operations per s.

    On a CPU it is the best of sizes from 256 to 2048, and for bfloat16 not less than for float32,
    which it can be widened to.
    """
    sizes = (64,) if smoke else (8192,) if device.type == "cuda" else (256, 512, 1024, 2048)
    least = 0.0 if smoke or device.type == "cuda" else 0.5
    wide, narrow = (
        max(gemm(device, kind, size, least) for size in sizes)
        for kind in (torch.float32, torch.bfloat16)
    )
    return {"float32": wide, "bfloat16": max(wide, narrow)}
