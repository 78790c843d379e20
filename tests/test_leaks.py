"""Calls leave nothing behind: 500 of each operator here, 10,000 with FASTRES_CALLS."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from every_call import EVERY, POLICIES

CALLS = int(os.environ.get("FASTRES_CALLS", "500"))
SIZE = 3, 40, 2, torch.float32
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of memory that the process has, but for what is free and glibc has kept."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def tensors() -> int:
    """Tensors that Python has."""
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def grown(call, calls: int) -> tuple[int, int, int]:
    """Call so often; by how much bytes, blocks of Python objects, and tensors have become more."""
    for _ in range(max(50, calls)):  # caches of torch and ours, the allocator's arenas
        call()
    before = tensors(), sys.getallocatedblocks(), resident()
    for _ in range(calls):
        call()
    after = tensors(), sys.getallocatedblocks(), resident()
    alive, blocks, size = (b - a for a, b in zip(before, after, strict=True))
    return size, blocks, alive


needs_statm = pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/statm")


@needs_statm
@pytest.mark.parametrize("name", EVERY)
def test_memory_does_not_grow_with_calls(name, record_property):
    calls = CALLS // 10 if name in POLICIES and CALLS < 10_000 else CALLS
    size, blocks, alive = grown(lambda: EVERY[name](*SIZE), calls)
    record_property("calls", calls)
    record_property("resident_bytes", size)
    assert alive <= 0  # what earlier tests have left may go meanwhile
    assert blocks < 2 * calls + 500  # an object with what belongs to it is more
    assert size < 4 << 20


@needs_statm
@pytest.mark.parametrize("kept", ["tensors", "objects", "bytes"])
def test_what_stays_behind_is_found(kept):
    left = []

    def leak():
        if kept == "tensors":
            left.append(torch.zeros(1))
        elif kept == "objects":
            left.append({"sums": [[], []]})
        else:
            left.append(torch.ones(1 << 14).untyped_storage())

    size, blocks, alive = grown(leak, CALLS)
    found = {
        "tensors": alive >= CALLS,
        "objects": blocks > 2 * CALLS + 500,
        "bytes": size > 4 << 20,
    }
    assert found[kept]
