"""Without memory a call raises what torch or Python would; no thread waits for one that failed."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fastres.ops import native

pytestmark = [
    pytest.mark.skipif(native.C is None, reason="the compiled library is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits address space, read in /proc"),
]

LIMIT = """
import faulthandler, resource, torch, fastres

faulthandler.dump_traceback_later(100, exit=True)
torch.set_num_threads(2)
most = resource.getrlimit(resource.RLIMIT_AS)[1]

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def error(fn):
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def run(script, **env):
    """Run a script in a process of its own; return the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT + script],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_output_that_does_not_fit_raises_what_torch_does():
    ours, strided, torchs = run("""
x = torch.ones(8, 1 << 20)
fastres.residual_add(x[:1], x[:1])
w = torch.ones(1, 2, 2)
resource.setrlimit(resource.RLIMIT_AS, (used() + (16 << 20), most))
print(error(lambda: fastres.residual_add(x, x)))
print(error(lambda: fastres.mlp_stack(x.view(2, -1).t(), w, w[..., 0], w.mT, w[:, 0])))
print(error(lambda: x + x))
""")
    assert "can't allocate memory: you tried to allocate 33554432 bytes" in torchs
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # from then on it tells
        assert ours == strided == torchs
    else:
        assert "out of memory" in ours


# Two threads share a tile, and each widens weights to 16 MiB of its own: with a little less than
# both need, one of them gets what the other wants.
TEAM = """
x, b1, b2 = (torch.ones(s, dtype=torch.bfloat16) for s in ((2, 1 << 17), (1, 64), (1, 1 << 17)))
w = torch.full((1 << 23,), 2.0**-12, dtype=torch.bfloat16)
stack = x.requires_grad_(), w.view(1, 64, -1), b1, w.view(1, -1, 64), b2

def call():
    y, _ = fastres.mlp_stack(*stack)
    return y, *torch.autograd.grad(y, x, y)

first, before = call(), used()

def same():
    for a, b in zip(call(), first):
        assert torch.equal(a, b)

for mib in range(0, 80, 2):
    resource.setrlimit(resource.RLIMIT_AS, (before + (mib << 20), most))
    for _ in range(6):
        print(error(same))
"""


def test_a_team_of_threads_raises_until_there_is_enough():
    # AMX widens nothing; threads that do not sleep come in time to take part.
    said = run(TEAM, FASTRES_ISA="avx512", OMP_WAIT_POLICY="active")
    assert "MemoryError: std::bad_alloc" in said
    known = "None|MemoryError: .*bad_alloc|.*can't allocate .*|.*out of memory"
    assert all(re.fullmatch(known, line) for line in said)
    assert said[-20:] == ["None"] * 20
