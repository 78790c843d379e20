"""conftest: devices, and what a skipped test means."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda", action="store_true", help="a test that lacks a GPU or its kernels fails"
    )
    parser.addoption("--require-data", action="store_true", help="a test that lacks data fails")


def pytest_collection_modifyitems(items):
    """Small kernels on every core of a busy machine measure the scheduler, not the code."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every device the contract holds on; cuda is skipped, or fails with --require-cuda."""
    from fastres.ops import native

    device = torch.device(request.param)
    if device.type == "cuda" and not torch.cuda.is_available():
        if request.config.getoption("--require-cuda"):
            pytest.fail("no CUDA device")
        pytest.skip("no CUDA device")
    if not native.runs_on(device) and request.config.getoption("--require-cuda"):
        pytest.fail(f"fastres has no {device.type} kernels: {native.missing}")
    return device
