"""The instruction sets of a CPU: the same numbers by all of them, each as fast as it is wide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.ops import native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(native.C is None, reason="the compiled library is not built")
BUILT = native.C.build_info()["isas_built"] if native.C else []
WIDEST = native.C.build_info()["isa_in_use"] if native.C else ""
# Those below the widest that this CPU has.
LOWER = BUILT[: BUILT.index(WIDEST)] if native.C else []


def run(isa, *command):
    """Run Python with no more than an instruction set; return what it prints."""
    command = [sys.executable, *command]
    env = {**os.environ, "FASTRES_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ADD = """
import torch, fastres
torch.manual_seed(0)
x, f = torch.randn(2, 3, 4099)
y, s = fastres.residual_add(x.half(), f.half(), 0.3, relu=True)
b, t = fastres.residual_add(x.bfloat16(), f.bfloat16(), relu=True)
print(y.double().sum().item(), b.double().sum().item(), *s.sums.flatten().tolist())
"""


@pytest.mark.parametrize("isa", LOWER)
def test_every_instruction_set_gives_the_same_numbers(isa):
    ours, widest = ([float(v) for v in run(i, "-c", ADD).split()] for i in (isa, WIDEST))
    torch.testing.assert_close(ours, widest, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("isa", LOWER)
def test_few_samples_stages_and_paths_are_right_by_every_instruction_set(isa):
    tests = ["test_mlp_stack_few.py", "test_conv_stack_stages.py", "test_mlp_stack_paths.py"]
    run(isa, "-m", "pytest", "-q", *(f"tests/{test}" for test in tests))


STACK = """
import sys, time, torch, fastres
torch.set_num_threads(1)
x, w, b = torch.randn(64, 64), torch.randn(100, 64, 64) / 30, torch.zeros(100, 64)
op = fastres.mlp_stack
if "conv" in sys.argv:
    x, w, b = torch.randn(4, 64, 8, 8), torch.randn(9, 64, 64, 3, 3) / 90, torch.zeros(9, 64)
    op = fastres.conv_stack
if "bfloat16" in sys.argv:
    x, w, b = x.bfloat16(), w.bfloat16(), b.bfloat16()
def seconds():
    start = time.perf_counter()
    op(x, w, b, w, b)
    return time.perf_counter() - start
print(min(seconds() for _ in range(50)))
"""


@pytest.mark.skipif("avx512" not in [*LOWER, WIDEST], reason="a CPU without AVX-512")
def test_registers_half_as_wide_take_no_more_than_four_times_as_long():
    # Twice is what it comes to. A tile that goes through memory takes nine times as long.
    assert float(run("avx2", "-c", STACK)) < 4 * float(run("avx512", "-c", STACK))


@pytest.mark.skipif(WIDEST != "amx", reason="a CPU without AMX")
@pytest.mark.parametrize("op", ["mlp", "conv"])
def test_tile_registers_are_faster_than_widening_bfloat16(op):
    amx, avx512 = (float(run(isa, "-c", STACK, "bfloat16", op)) for isa in ("amx", "avx512"))
    assert amx < 0.7 * avx512, (amx, avx512)  # 0.3 is what it comes to
