"""Tiles: 16-bit elements against torch; functions and activations against float64."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_cpu import build

from fastres.ops import native
from fastres.ops.mlp_stack_blocks import ACTIVATIONS, CODES

SOURCE = Path(__file__).with_name("tiles.cpp")
EXACT = {0: torch.exp, 1: torch.tanh, 2: torch.erf}


FLAGS = build.of_setup("ISA_FLAGS")


def sets() -> list[str]:
    """Instruction sets with a build of their own that this CPU has, by what the library found."""
    if native.C is None or platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    info = native.C.build_info()
    known = info["isas_built"][: info["isas_built"].index(info["isa_in_use"]) + 1]
    return [isa for isa in known if isa in FLAGS]


@pytest.fixture(scope="module", params=sets())
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    if shutil.which(build.COMPILER) is None:
        pytest.skip(f"no C++ compiler ({build.COMPILER})")
    made = tmp_path_factory.mktemp("tiles") / f"{request.param}.so"
    options = ["-O3", *build.of_setup("KERNEL_FLAGS"), *FLAGS[request.param]]
    options += ["-shared", "-fPIC", f"-DFASTRES_ISA={request.param}"]
    build.run([build.COMPILER, *options, str(SOURCE), "-o", str(made)])
    return ctypes.CDLL(str(made))


def call(function, which: int, given: np.ndarray, outputs: int) -> list[np.ndarray]:
    out = [np.empty_like(given) for _ in range(outputs)]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (given, *out)]
    function(ctypes.c_int(which), *pointers, ctypes.c_int64(given.size))
    return out


def every_kind_of_float32() -> np.ndarray:
    """Every 1021st of all bit patterns: both signs, denormals, infinities and NaN included."""
    bits = np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.7, 88.8, -87.4, -103.9, -104.5], "f4")
    values = np.concatenate([bits.view(np.float32), edges, np.linspace(-12, 12, 99991, dtype="f4")])
    return np.resize(values, values.size // 16 * 16 + 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_elements_are_torchs(library, dtype: torch.dtype) -> None:
    is_bfloat16 = ctypes.c_int(dtype == torch.bfloat16)

    def run(function, given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, out)]
        function(is_bfloat16, *pointers, ctypes.c_int64(given.numel()))
        return out

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = run(library.widen, every, torch.empty(every.shape))
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    finite = wide[wide.isfinite()].sort().values
    halfway = (finite[1:] / 2 + finite[:-1] / 2).numpy()
    up, down = (np.nextafter(halfway, np.float32(to)) for to in (np.inf, -np.inf))
    numbers = np.concatenate([every_kind_of_float32(), halfway, up, down])
    given = torch.from_numpy(np.resize(numbers, numbers.size // 16 * 16 + 16))
    narrow = run(library.narrow, given, torch.empty(given.shape, dtype=dtype))
    torch.testing.assert_close(narrow, given.to(dtype), rtol=0, atol=0, equal_nan=True)
    number = ~given.isnan()
    assert narrow[number].signbit().equal(given[number].signbit())


@pytest.mark.parametrize("which", EXACT, ids=["exp", "tanh", "erf"])
def test_float32_functions_are_within_two_units_in_the_last_place(library, which: int) -> None:
    given = every_kind_of_float32()
    (got,) = call(library.function32, which, given, 1)
    exact = EXACT[which](torch.from_numpy(given).double()).numpy()
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float32)
    special = ~np.isfinite(nearest)
    np.testing.assert_array_equal(got[special], nearest[special])
    unit = np.spacing(np.abs(nearest[~special])).astype(np.float64)
    assert (np.abs(got[~special] - exact[~special]) / unit).max() <= 2
    number = ~np.isnan(given)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(exact[number]))


@pytest.mark.parametrize("which", EXACT, ids=["exp", "tanh", "erf"])
def test_float64_functions_are_those_of_the_c_library(library, which: int) -> None:
    given = np.linspace(-30, 30, 4096)
    (got,) = call(library.function64, which, given, 1)
    torch.testing.assert_close(
        torch.from_numpy(got), EXACT[which](torch.from_numpy(given)), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_activations_and_their_derivatives_are_torchs(library, name: str, dtype: str) -> None:
    given = np.linspace(-20, 20, 8192, dtype=dtype)
    function = library.activation32 if dtype == "f4" else library.activation64
    value, derivative = call(function, CODES[name], given, 2)
    z = torch.from_numpy(given.astype("f8")).requires_grad_()
    exact = ACTIVATIONS[name](z)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == "f4" else {"rtol": 1e-14, "atol": 1e-14}
    np.testing.assert_allclose(value, exact.detach().numpy(), **tolerance)
    np.testing.assert_allclose(derivative, slope.numpy(), **tolerance)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("name", CODES)
def test_activations_of_values_without_bound_are_torchs(library, name: str) -> None:
    # inf * 0 is NaN in torch's formulas too. 1 / exp(90) may be 0 or a denormal.
    large = [0.0, 10.0, 90.0, 1e4, 1e12, 1e15, 1e20, 3e38, np.inf]
    given = np.resize(np.array([np.nan, *large, *np.negative(large)], "f4"), 32)
    value, derivative = call(library.activation32, CODES[name], given, 2)
    z = torch.from_numpy(given).requires_grad_()
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gelu of infinity is NaN
        exact = ACTIVATIONS[name](z)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    np.testing.assert_allclose(value, exact.detach().numpy(), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(derivative, slope.numpy(), rtol=1e-6, atol=1e-6)


def test_relu_passes_nan_on_as_torchs_does(library) -> None:
    given = np.array([np.nan, 0.0, -0.0, -1.0, 1.0, np.inf, -np.inf, np.nan] * 2, "f4")
    value, derivative = call(library.activation32, CODES["relu"], given, 2)
    z = torch.from_numpy(given).requires_grad_()
    exact = torch.relu(z)
    (slope,) = torch.autograd.grad(exact.sum(), z)
    np.testing.assert_array_equal(value, exact.detach().numpy())
    np.testing.assert_array_equal(derivative, slope.numpy())
