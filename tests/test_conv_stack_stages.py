"""conv_stack on the stages of networks for CIFAR, which a GPU takes whole; its CUDA kernels."""

import pytest
import torch
from contract import DTYPES, largest_error

from benchmarks.conv_stack import STAGES, eager, separate, tensors
from fastres.ops import native
from fastres.ops.conv_stack import allows_tf32, conv_stack, reference


def stage(channels, side, dtype, device, blocks=2, batch=3):
    torch.manual_seed(0)
    return tensors((blocks, batch, channels, side, side), dtype, device)


@pytest.fixture
def tf32(request):
    """Convolutions of float32 are rounded to tf32 on CUDA where the parameter says so."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


# Tile registers take 16 pixels twice, or once: in a row, past its end, and more than there are.
@pytest.mark.parametrize("tf32", [False], indirect=True)
@pytest.mark.parametrize(("channels", "side"), [*STAGES, (48, 1), (80, 5), (16, 20), (32, 48)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stage_is_no_less_exact_than_twice_eager(device, dtype, channels, side, tf32):
    x, *weights = stage(channels, side, dtype, device)
    y, stats = conv_stack(x, *weights)
    exact, sums = reference(x.double(), *(w.double() for w in weights))
    unit = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    bound = 2 * max(largest_error([eager(x, separate(weights))], [exact]), unit)
    assert largest_error([y], [exact]) <= bound
    size = (sums.skip_sq + sums.branch_sq).sqrt()
    for got, want in ((stats.skip_sq, sums.skip_sq), (stats.branch_sq, sums.branch_sq)):
        assert ((got.double().sqrt() - want.sqrt()).abs() <= 8 * unit * size).all()


@pytest.mark.parametrize("tf32", [False, True], indirect=True)
def test_tf32_is_what_torch_says_of_convolutions(tf32):
    assert allows_tf32() == tf32


@pytest.mark.parametrize("tf32", [True], indirect=True)
@pytest.mark.parametrize(("channels", "side"), STAGES)
def test_tf32_rounds_to_eleven_bits(cuda, channels, side, tf32):
    x, *weights = stage(channels, side, torch.float32, cuda)
    y, _ = conv_stack(x, *weights)
    exact, _ = reference(x.double(), *(w.double() for w in weights))
    assert 2.0**-24 < largest_error([y], [exact]) < 2.0**-8


@pytest.mark.parametrize(("channels", "side"), STAGES)
def test_a_hopper_gpu_takes_a_stage_whole(cuda, channels, side):
    resident = native.raw("_conv_stack_resident")
    whole = torch.cuda.get_device_capability(cuda)[0] == 9
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, *_ = stage(channels, side, dtype, cuda)
        assert resident(x, True) or not whole
        assert not resident(x[..., 1:], True)
    assert not resident(x.double(), True)
    assert not resident(x.float(), False)


@pytest.mark.parametrize(("channels", "side"), [*STAGES, (24, 12)])
def test_a_cuda_graph_replays_the_same_bits(cuda, channels, side):
    x, *weights = stage(channels, side, torch.bfloat16, cuda)
    want, stats = conv_stack(x, *weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, kept = conv_stack(x, *weights)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)
    assert torch.equal(kept.dot, stats.dot)
