"""Offsets and grids of tensors of more than 2^31 elements, without their memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import build

import fastres
from fastres.ops import residual_add

HERE = build.HERE.parent
FAR = (1 << 31) + 7


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which(build.COMPILER) is None:
        pytest.skip(f"no C++ compiler ({build.COMPILER})")
    made = tmp_path_factory.mktemp("large") / "large_offsets.so"
    options = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", "-shared"]
    build.run([build.COMPILER, *options, str(HERE / "large_offsets.cpp"), "-o", str(made)])
    return made


@pytest.mark.parametrize(
    ("which", "op"),
    [*enumerate(("residual_add", "batch_norm_residual", "path_accumulate", "mlp_stack"))],
)
def test_the_last_rows_of_a_large_tensor_are_those_of_a_small_one(kernels, which, op):
    # in a process of its own, which a wrong offset ends
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).same(int(sys.argv[2])))"
    command = [sys.executable, "-c", code, str(kernels), str(which)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout == "-1\n":
        pytest.skip("no address space")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_grids_are_within_their_limits_and_offsets_beyond_2_31():
    library = ctypes.CDLL(str(build.library([HERE / "large_grids.cpp"], build.toolkit())))
    library.wrong.restype = ctypes.c_char_p
    assert library.wrong() is None


@pytest.fixture
def apart(tmp_path):
    """A vector whose elements lie 8 GiB apart, in a file that has holes between them."""
    count = 3
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(4 * (FAR * (count - 1) + 1))
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=FAR * (count - 1) + 1)
    return whole.as_strided((count,), (FAR,)).copy_(torch.tensor([0.5, 2.0, -3.0]))


def test_strides_beyond_2_31_are_followed(apart):
    x, f = torch.randn(3, 5), torch.randn(3, 5)
    y, stats = residual_add(x, f, apart)
    expected, sums = residual_add(x, f, apart.clone())
    assert apart.stride(0) == FAR
    assert torch.equal(y, expected)
    assert torch.equal(stats.branch_sq, sums.branch_sq)
    weights = [torch.randn(n) / 2 for n in ((2, 4, 5), (2, 4), (2, 5, 4), (2, 5))]
    y, _ = fastres.mlp_stack(x, *weights, apart.expand(2, 3))
    assert torch.equal(y, fastres.mlp_stack(x, *weights, apart.clone().expand(2, 3))[0])


@pytest.mark.parametrize(("hidden", "width"), [((1 << 30) + 1, 1), (1, (1 << 30) + 1)])
def test_a_stack_is_not_wider_than_a_column_number_of_a_gpu(hidden, width):
    one = torch.zeros(1)
    shapes = (2, width), (1, hidden, width), (1, hidden), (1, width, hidden), (1, width)
    with pytest.raises(ValueError, match=r"mlp_stack: w1 must have sizes H, D <= 2\^30, got \[1, "):
        fastres.mlp_stack(*[one.expand(shape) for shape in shapes])
