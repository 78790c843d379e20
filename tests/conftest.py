"""conftest: devices, and what a skipped test means."""

import contextlib
import ctypes

import pytest
import torch
from hypothesis import HealthCheck, settings

for _name, _calls in (("ci", 100), ("nightly", 2000)):  # --hypothesis-profile=nightly
    settings.register_profile(
        _name,
        max_examples=_calls,
        derandomize=_name == "ci",
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile("ci")

# What a GPU computes in float32 is held to float32's own rounding, of convolutions too.
torch.backends.cudnn.allow_tf32 = False
# And the same each time, as gradcheck asks for.
torch.backends.cudnn.deterministic = True

# glibc fills what it allocates with the complement of the lowest byte, 0xff: what a kernel forgets
# to write is NaN, and not 0 by luck.
with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
    _M_PERTURB = -6
    ctypes.CDLL(None).mallopt(_M_PERTURB, 0x100)


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda", action="store_true", help="a test that lacks a GPU or its kernels fails"
    )
    parser.addoption("--only-cuda", action="store_true", help="only what runs on a GPU")


def pytest_collection_modifyitems(config, items):
    """Small kernels on every core of a busy machine measure the scheduler, not the code."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if config.getoption("--only-cuda"):
        others = [item for item in items if not _runs_on_cuda(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _runs_on_cuda(item)]


def _runs_on_cuda(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("device") == "cuda" or "cuda" in item.fixturenames


def _available(request, device):
    """Skip, or fail with --require-cuda, where a device or its kernels are missing."""
    from fastres.ops import native

    lacking = "no CUDA device" if device.type == "cuda" and not torch.cuda.is_available() else ""
    if request.config.getoption("--require-cuda"):
        if not lacking and not native.runs_on(torch.empty(0, device=device)):
            lacking = f"fastres has no {device.type} kernels: {native.missing}"
        if lacking:
            pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    return device


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every device the contract holds on."""
    return _available(request, torch.device(request.param))


@pytest.fixture
def cuda(request):
    """The CUDA device, for what is said of it alone."""
    return _available(request, torch.device("cuda"))
