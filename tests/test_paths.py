"""The gradient by path length is that of all 2^L paths, one by one, in any network."""

from __future__ import annotations

import math

import pytest
import torch
from models import InPlaceBlock, cifar_resnet, residual_mlp, torchvision
from path_models import (
    SwitchBlock,
    SwitchPadded,
    by_length,
    enumerate_paths,
    squares,
    switch_mlp,
    two_layers,
)
from torch import Tensor, nn

from fastres.nn import ResidualMLP
from fastres.ops import residual_add
from fastres.paths import path_gradients
from fastres.sites import add


def vectors(batch: int = 3, features: int = 3, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, features, generator=source, dtype=torch.float64)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def ordinary(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(squares(model(leaf)), leaf)[0]


class Scale(nn.Module):
    """x + c x, with x -> c x as the branch."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c * x


# The numbers are right.


def test_ten_blocks_have_the_gradients_of_their_1024_paths():
    model, x = switch_mlp(10), vectors()
    sums, _, _ = by_length(model, x)
    paths = path_gradients(model, x, squares, keep=True)
    torch.testing.assert_close(paths.gradients, sums, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(paths.norms, sums.flatten(1).norm(dim=1), rtol=1e-11, atol=0)
    each = sums.flatten(2).norm(dim=2)
    torch.testing.assert_close(paths.norms_per_sample, each, rtol=1e-11, atol=0)
    g = sums.sum(0)
    torch.testing.assert_close(paths.gradient, g, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(paths.shares, (sums * g).flatten(1).sum(1) / (g * g).sum())
    dots = (sums * g).flatten(2).sum(2)
    torch.testing.assert_close(paths.shares_per_sample, dots / (g * g).flatten(1).sum(1))
    assert paths.paths == tuple(math.comb(10, k) for k in range(11))
    assert paths.tail_share == 0
    assert not paths.tail.any()


@pytest.mark.parametrize("c", [0.3, -0.2, 2.0])
def test_branches_of_c_times_x_have_binomial_norms(c):
    model = nn.Sequential(*[Scale(c) for _ in range(12)])
    x = vectors()
    paths = path_gradients(model, x, torch.sum)
    known = torch.tensor([math.comb(12, k) * abs(c) ** k for k in range(13)], dtype=torch.float64)
    torch.testing.assert_close(paths.norms, known * x.numel() ** 0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [None, 1, 7, 400])
@pytest.mark.parametrize("c", [0.01, 1e-4])
def test_300_blocks_span_1200_orders_of_magnitude_in_float32(c, chunk):
    model = nn.Sequential(*[Scale(c) for _ in range(300)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, chunk=chunk)
    stored = torch.tensor(c).item()  # what float32 makes of c
    known = [math.log2(math.comb(300, k)) + k * math.log2(stored) for k in range(301)]
    known = torch.tensor(known, dtype=torch.float64) + math.log2(6) / 2
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)
    assert paths.log2_norms[-1] < -1900
    assert paths.sum_error < 1e-5


@pytest.mark.parametrize("chunk", [1, 3])
def test_one_branch_may_shrink_by_all_that_float32_holds(chunk):
    c = 2.0**-120
    model = nn.Sequential(*[Scale(c) for _ in range(9)]).float()
    paths = path_gradients(model, torch.full((2, 3), 2.0**-20), torch.sum, chunk=chunk)
    known = [math.log2(math.comb(9, k)) - 120 * k + math.log2(6) / 2 for k in range(10)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)


class NestedScale(nn.Module):
    """x + z + c z with z = c x: a site in the branch of another."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c, self.inner = nn.Parameter(torch.tensor(c, dtype=torch.float64)), Scale(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.c * x)


@pytest.mark.parametrize("chunk", [1, 5, 300])
def test_nested_blocks_keep_their_range_too(chunk):
    c, blocks = 2.0**-13, 60
    model = nn.Sequential(*[NestedScale(c) for _ in range(blocks)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, chunk=chunk)
    assert sum(paths.paths) == 3**blocks  # (1 + t + t^2)^60
    known = [math.log2(n) - 13 * k + math.log2(6) / 2 for k, n in enumerate(paths.paths)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)


class ParallelScale(nn.Module):
    """x + z + c z with z = c x, as the mean of two sites side by side."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))
        self.one, self.two = Scale(c), Scale(c)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(self.c * x), self.two(self.c * x)])
        return x + both.mean(0)


@pytest.mark.parametrize("chunk", [1, 2, 30])
def test_sites_side_by_side_are_both_counted(chunk):
    c, blocks = 0.25, 6
    model = nn.Sequential(*[ParallelScale(c) for _ in range(blocks)])
    paths = path_gradients(model, vectors(), torch.sum, chunk=chunk)
    assert len(paths.sites) == 18
    powers = [1]  # (1 + t + t^2)^6
    for _ in range(blocks):
        powers = [sum(powers[max(0, k - 2) : k + 1]) for k in range(len(powers) + 2)]
    known = [n * c**k * 3 for k, n in enumerate(powers)]
    assert paths.norms[:13].tolist() == pytest.approx(known, rel=1e-12)
    assert not paths.norms[13:].any()


def test_a_tail_far_below_1_is_held_exactly():
    model = nn.Sequential(*[Scale(0.01) for _ in range(300)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, 40)
    known = sum(math.comb(300, k) * 0.01**k for k in range(41, 301))
    assert paths.tail_norm == pytest.approx(known * 6**0.5, rel=1e-4)
    assert paths.tail[0, 0].item() == pytest.approx(known, rel=1e-4)


def test_norms_beyond_float32_are_right_and_that_they_cancel_is_said():
    model = nn.Sequential(*[Scale(-2.0) for _ in range(300)]).float()
    with pytest.warns(UserWarning, match=r"the lengths cancel, .* 1\.4e\+143 times"):
        paths = path_gradients(model, torch.ones(2, 3), torch.sum)
    known = [math.log2(math.comb(300, k)) + k + math.log2(6) / 2 for k in range(301)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_54_conv_blocks_add_up(dtype, error):
    torch.manual_seed(0)
    blocks = [SwitchPadded(4, 4, 1) for _ in range(54)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten()).to(dtype).eval()
    paths = path_gradients(model, images().to(dtype), squares)
    assert len(paths.sites) == 54
    assert paths.sum_error < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_300_mlp_blocks_add_up(dtype, error):
    torch.manual_seed(0)
    model = ResidualMLP(8, 3, width=8, blocks=300).to(dtype)
    paths = path_gradients(model, torch.randn(4, 8, dtype=dtype), squares)
    assert paths.sites == tuple(f"stack[{k}]" for k in range(300))
    assert paths.sum_error < error
    assert paths.paths[150] == math.comb(300, 150)
    assert paths.shares.sum().item() == pytest.approx(1, abs=error)


@pytest.mark.parametrize("train", [False, True])
def test_projections_and_batch_norm_in_both_modes_have_the_gradients_of_their_paths(train):
    torch.manual_seed(0)
    model = cifar_resnet(SwitchPadded).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
    model.train(train)
    buffers = [b.clone() for b in model.buffers()]
    paths = path_gradients(model, images(), squares, keep=True)
    assert all(map(torch.equal, buffers, model.buffers()))
    sums, _, _ = by_length(model, images())
    torch.testing.assert_close(paths.gradients, sums, rtol=1e-9, atol=1e-12)
    assert paths.mixes_samples == train


def nested() -> nn.Sequential:
    torch.manual_seed(0)
    inner = [SwitchBlock(two_layers(5)) for _ in range(2)]
    outer = SwitchBlock(nn.Sequential(nn.Linear(5, 5), *inner, nn.Linear(5, 5)))
    blocks = [SwitchBlock(two_layers(5)), outer, SwitchBlock(two_layers(5))]
    return nn.Sequential(nn.Linear(3, 5), *blocks).double()


def is_once(path: tuple[bool, ...]) -> bool:
    """Tell whether no inner block is taken where the outer one is not: those are one path."""
    return path[1] or not (path[2] or path[3])


def test_a_site_in_the_branch_of_another_adds_to_the_length():
    model = nested()
    sums, _, _ = by_length(model, vectors(), allowed=is_once)
    paths = path_gradients(model, vectors(), squares, keep=True)
    torch.testing.assert_close(paths.gradients, sums, rtol=1e-11, atol=1e-13)
    # (1 + t)^2 (1 + t (1 + t)^2)
    assert paths.paths == (1, 3, 5, 6, 4, 1)


def test_paths_may_begin_inside_a_branch():
    model = nested()
    paths = path_gradients(model, vectors(), squares, where="2.branch.2")
    assert paths.sites == ("2.branch.2", "2", "3")
    assert paths.paths == (0, 1, 2, 1)  # all go through the branch of the outer block
    assert paths.norms[0] == 0
    assert paths.sum_error < 1e-12
    assert path_gradients(
        model, vectors(), squares, where="2.branch.2", method="sampled", draws=2
    ).count_times_mean[3] == pytest.approx(paths.norms[3].item())


def test_transformers_have_two_sites_per_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    x = torch.randn(2, 5, 16).double()
    for mode in (True, False):
        paths = path_gradients(model.train(mode), x, squares)
        assert len(paths.sites) == 6
        assert paths.sum_error < 1e-12
        assert paths.norms[6] > 0


def test_a_vision_transformer_adds_up():
    model = torchvision().models.VisionTransformer(32, 16, 2, 4, 64, 64, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # it begins as zero
    x = torch.randn(2, 3, 32, 32)
    paths = path_gradients(model.double().eval(), x.double(), squares)
    assert len(paths.sites) == 4
    assert paths.sum_error < 1e-12
    torch.testing.assert_close(paths.gradient, ordinary(model, x.double()))


def test_a_timm_model_adds_up():
    timm = pytest.importorskip("timm")
    torchvision()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).double().eval()
    paths = path_gradients(model, images().repeat(1, 1, 4, 4), squares)
    assert len(paths.sites) == 4
    assert paths.sum_error < 1e-12


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.write = nn.Linear(3, 3), nn.Linear(3, 3), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.write(x.sin(), self.one), self.two)


WAYS = {
    "plus": lambda x, f: x + f(x),
    "reversed": lambda x, f: f(x) + x,
    "in place": lambda x, f: f(x).add_(x),
    "in place, by operator": lambda x, f: f(x).__iadd__(x),
    "into the skip": lambda x, f: x.clone().add_(f(x)),
    "alpha": lambda x, f: torch.add(x, f(x), alpha=-0.5),
    "alpha on the skip": lambda x, f: torch.add(f(x), x, alpha=2),
    "by name": lambda x, f: torch.add(input=f(x), other=x),
    "declared": lambda x, f: add(x, f(x)),
    "declared by name": lambda x, f: add(f=f(x), x=x),
    "residual_add": lambda x, f: residual_add(x, f(x), gate=0.5, relu=True)[0],
}


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_the_add_is_counted(way, chunk, method):
    model, x = Written(WAYS[way]).double(), vectors()
    paths = path_gradients(model, x, squares, chunk=chunk, method=method, draws=1)
    torch.testing.assert_close(paths.gradient, ordinary(model, x), rtol=1e-12, atol=0)
    if method == "exact":
        assert paths.sum_error < 1e-12
        assert (paths.norms > 1e-3).all()
        return
    exact = path_gradients(model, x, squares)
    assert paths.mean_norm[0].item() == pytest.approx(exact.norms[0].item(), rel=1e-10)
    assert paths.mean_norm[2].item() == pytest.approx(exact.norms[2].item(), rel=1e-10)


def test_the_first_layer_may_change_the_input_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 1), InPlaceBlock(8)).double()
    x = images()
    before = x.clone()
    paths = path_gradients(model, x, squares)
    assert torch.equal(x, before)
    assert paths.sum_error < 1e-12


# Less than all lengths, and more than one pass.


@pytest.mark.parametrize("longest", [0, 1, 4, 9, 10])
def test_what_is_longer_is_in_the_tail_exactly(longest):
    model, x = switch_mlp(10), vectors()
    whole = path_gradients(model, x, squares, keep=True)
    paths = path_gradients(model, x, squares, longest, keep=True)
    torch.testing.assert_close(paths.gradients, whole.gradients[: longest + 1])
    rest = whole.gradients[longest + 1 :].sum(0)
    torch.testing.assert_close(paths.tail, rest, rtol=1e-10, atol=1e-16)
    assert paths.tail_norm == pytest.approx(rest.norm().item(), rel=1e-10)
    assert paths.tail_share == pytest.approx(whole.shares[longest + 1 :].sum().item(), abs=1e-12)
    assert (paths.max_length, len(paths.paths), len(paths.norms)) == (longest, *2 * [longest + 1])
    assert paths.sum_error < 1e-12


@pytest.mark.parametrize("longest", [None, 3])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 11, 100])
def test_no_result_depends_on_the_chunks(chunk, longest):
    model, x = switch_mlp(10), vectors()
    one = path_gradients(model, x, squares, longest, chunk=100, keep=True)
    other = path_gradients(model, x, squares, longest, chunk=chunk, keep=True)
    torch.testing.assert_close(other.gradients, one.gradients, rtol=1e-13, atol=1e-17)
    torch.testing.assert_close(other.tail, one.tail, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0])
def test_the_moments_are_those_of_the_exact_shares(gain, chunk):
    model, x = switch_mlp(10, gain=gain), vectors()
    exact = path_gradients(model, x, squares)
    moments = path_gradients(model, x, squares, method="moments", chunk=chunk)
    length = torch.arange(11).double()
    mean = (length * exact.shares).sum().item()
    variance = ((length - mean).square() * exact.shares).sum().item()
    assert moments.mean_length == pytest.approx(mean, rel=1e-8)
    assert exact.mean_length == pytest.approx(mean, rel=1e-8)
    for paths in (exact, moments):
        if variance >= 0:
            assert paths.std_length == pytest.approx(variance**0.5, rel=1e-8)
        else:
            assert math.isnan(paths.std_length)


# Single paths.


def test_the_energy_is_that_of_all_paths_within_three_standard_errors():
    model, x = switch_mlp(10), vectors()
    _, energy, _ = by_length(model, x)
    paths = path_gradients(model, x, squares, method="energy", draws=200)
    off = (paths.energy - energy).abs()
    assert (off <= 3 * paths.energy_error + 1e-12 * energy).all()
    assert (paths.energy_error[1:-1] < 0.3 * energy[1:-1]).all()
    assert paths.energy[0].item() == pytest.approx(energy[0].item(), rel=1e-12)
    assert paths.energy[10].item() == pytest.approx(energy[10].item(), rel=1e-12)


def test_the_energy_beyond_the_longest_length_is_that_of_the_tail():
    model, x = switch_mlp(8), vectors()
    _, energy, _ = by_length(model, x)
    paths = path_gradients(model, x, squares, 1, method="energy", draws=400)
    assert paths.tail_energy == pytest.approx(energy[2:].sum().item(), rel=0.2)
    torch.testing.assert_close(paths.energy, energy[:2], rtol=0.2, atol=0)


def test_sampled_paths_have_the_mean_norm_of_all():
    model, x = switch_mlp(8), vectors()
    _, _, norms = by_length(model, x)
    counts = torch.tensor([math.comb(8, k) for k in range(9)]).double()
    paths = path_gradients(model, x, squares, method="sampled", draws=100)
    off = (paths.mean_norm - norms / counts).abs()
    assert (off <= 3.5 * paths.mean_norm_error + 1e-12).all()
    torch.testing.assert_close(paths.count_times_mean, paths.mean_norm * counts)
    assert paths.mean_norm_error[0] < 1e-15
    assert (paths.mean_norm_error[1:-1] > 0).all()


def test_nested_paths_are_sampled_evenly():
    model = nested()
    norms, counts = torch.zeros(2, 6, dtype=torch.float64)
    for path, (g,) in enumerate_paths(model, vectors(), allowed=is_once):
        norms[sum(path)] += g.norm()
        counts[sum(path)] += 1
    paths = path_gradients(model, vectors(), squares, method="sampled", draws=300)
    off = (paths.mean_norm - norms / counts).abs()
    assert (off <= 3.5 * paths.mean_norm_error + 1e-12).all()


def test_count_times_mean_is_not_the_norm_of_the_sum():
    paths = [
        path_gradients(switch_mlp(10), vectors(), squares, method=method)
        for method in ("exact", "sampled")
    ]
    assert paths[1].count_times_mean[5] > 3 * paths[0].norms[5]


@pytest.mark.parametrize("method", ["energy", "sampled"])
def test_the_seed_decides_what_is_drawn(method):
    model, x = switch_mlp(6), vectors()
    state = torch.random.get_rng_state()
    draws = [
        path_gradients(model, x, squares, method=method, draws=5, seed=seed).weights
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.random.get_rng_state())


# Blocks.


def test_the_share_of_a_block_is_that_of_all_paths_through_its_branch():
    model, x = switch_mlp(6), vectors()
    through = torch.zeros(6, *x.shape).double()
    for path, (g,) in enumerate_paths(model, x):
        through[list(path)] += g
    paths = path_gradients(model, x, squares, 2, by="block")
    g = paths.gradient
    torch.testing.assert_close(paths.block_norms, through.flatten(1).norm(dim=1))
    torch.testing.assert_close(paths.block_shares, (through * g).flatten(1).sum(1) / (g * g).sum())
    mean = path_gradients(model, x, squares, method="moments").mean_length
    assert paths.block_shares.sum().item() == pytest.approx(mean)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("longest", [2, 5])
def test_parameter_gradients_are_split_by_the_branches_above(longest, chunk):
    model, x = switch_mlp(5), vectors()
    weights = [list(block.parameters()) for block in model[1:-1]]
    flat = [p for each in weights for p in each]
    sums = [torch.zeros(6, *p.shape).double() for p in flat]
    for path, grads in enumerate_paths(model, x, wanted=flat):
        for place, (total, g) in enumerate(zip(sums, grads, strict=True)):
            own = place // 4
            # what is below its own block does not matter: count such a path once
            if path[own] and not any(path[:own]):
                total[sum(path[own + 1 :])] += g
    blocks = [torch.cat([s.flatten(1) for s in sums[4 * i : 4 * i + 4]], 1) for i in range(5)]
    paths = path_gradients(model, x, squares, longest, by="block", chunk=chunk)
    for i, rows in enumerate(blocks):
        got = paths.weight_norms[i]
        torch.testing.assert_close(got, rows[:longest].norm(dim=1), rtol=1e-10, atol=1e-14)
        rest = rows[longest:].sum(0).norm().item()
        assert paths.weight_tails[i].item() == pytest.approx(rest, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("chunk", [1, 40])
def test_a_weight_of_several_blocks_has_the_sum_of_its_uses(chunk):
    c, blocks = 2.0**-10, 40
    block = Scale(c)
    model = nn.Sequential(*[block] * blocks).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, by="block", chunk=chunk)
    # in block i it multiplies (1 + c)^i, and j of the others above it are gone through
    known = [
        sum((1 + c) ** i * math.comb(blocks - 1 - i, j) * c**j for i in range(blocks)) * 6
        for j in range(8)
    ]
    assert paths.weight_norms[0, :8].tolist() == pytest.approx(known, rel=1e-5)
    assert not paths.weight_norms[1:].any()


def test_parameters_of_a_nested_block_are_those_of_the_inner_one():
    model = nested()
    paths = path_gradients(model, vectors(), squares, by="block")
    assert paths.sites == ("1", "2.branch.1", "2.branch.2", "2", "3")
    assert (paths.weight_norms[:, 0] > 0).tolist() == [True, False, False, True, True]
    assert (paths.weight_norms[1:3, 1] > 0).all()  # the outer branch is above


def test_slices_of_one_parameter_are_the_weights_of_their_own_blocks():
    torch.manual_seed(0)
    model = ResidualMLP(3, 2, width=5, blocks=4).double()
    paths = path_gradients(model, vectors(), squares, by="block")
    wanted = [p for name, p in model.named_parameters() if name.startswith("stack")]
    whole = torch.autograd.grad(squares(model(vectors())), wanted)
    last = torch.cat([g[3].flatten() for g in whole])  # no branch is above the last one
    torch.testing.assert_close(
        paths.weight_norms[3], torch.stack([last.norm(), *3 * [last[0] * 0]])
    )
    assert (paths.weight_norms[0] > 0).all()


# Where, and what is counted.


def test_paths_may_begin_at_the_block_of_any_site():
    model, x = switch_mlp(6), vectors()
    with torch.no_grad():
        stream = model[:4](x)
    rest = nn.Sequential(*model[4:])
    sums, _, _ = by_length(rest, stream)
    paths = path_gradients(model, x, squares, where="4", keep=True)
    assert paths.sites == ("4", "5", "6")
    torch.testing.assert_close(paths.gradients, sums)


def test_a_block_with_a_projection_begins_before_it():
    torch.manual_seed(0)
    model = cifar_resnet(SwitchPadded).double().eval()
    with torch.no_grad():
        stream = model[:2](images())
    sums, _, _ = by_length(nn.Sequential(*model[2:]), stream)
    paths = path_gradients(model, images(), squares, where="2", keep=True)
    torch.testing.assert_close(paths.gradients, sums, rtol=1e-9, atol=1e-12)


class Words(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(7, 5), nn.Embedding(4, 5)
        self.words.requires_grad_(not frozen)
        self.blocks = nn.Sequential(*[SwitchBlock(two_layers(5)) for _ in range(3)])

    def forward(self, ids: Tensor, shift: int = 0) -> dict[str, Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.size(1))) + shift
        return {"logits": self.blocks(x)}


@pytest.mark.parametrize("frozen", [False, True])
def test_integer_inputs_are_differentiated_at_their_embedding(frozen):
    model, ids = Words(frozen).double(), torch.tensor([[1, 2, 3, 0]])
    x = (model.words(ids) + model.places(torch.arange(4))).detach()
    sums, _, _ = by_length(model.blocks, x)
    for inputs in ((ids,), {"ids": ids, "shift": 0}, ids):
        paths = path_gradients(
            model, inputs, lambda out: squares(out["logits"]), where="embedding", keep=True
        )
        torch.testing.assert_close(paths.gradients, sums)
    assert model.words.weight.requires_grad is not frozen


def test_the_first_floating_argument_is_the_input():
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = switch_mlp(3)

        def forward(self, flag: Tensor, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.inner(x * scale)

    model, x, flag = Conditioned(), vectors(), torch.tensor(1)
    with pytest.raises(TypeError, match="scale"):
        path_gradients(model, [flag, x], squares)
    inputs = {"flag": flag, "x": x, "scale": torch.tensor(2.0)}
    paths = path_gradients(model, inputs, squares)
    assert paths.gradient.shape == x.shape
    torch.testing.assert_close(paths.gradient, 2 * ordinary(model.inner, 2 * x))


def test_only_the_named_sites_count():
    model, x = switch_mlp(5), vectors()
    sums = torch.zeros(3, *x.shape).double()
    for path, (g,) in enumerate_paths(model, x):
        sums[path[1] + path[3]] += g
    paths = path_gradients(model, x, squares, sites=["4", "2"], keep=True)
    assert (paths.sites, paths.paths) == (("2", "4"), (1, 2, 1))
    torch.testing.assert_close(paths.gradients, sums)
    single = path_gradients(model, x, squares, sites=["4", "2"], method="sampled", draws=1)
    torch.testing.assert_close(single.mean_norm[2], sums[2].norm())


def test_a_part_of_the_model_without_gradient_has_no_paths():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = switch_mlp(2)[:3], switch_mlp(3)[1:]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.first(x)
            return self.rest(x)

    paths = path_gradients(Frozen(), vectors(), squares, where="rest.2")
    assert paths.sites == ("rest.2", "rest.3")
    assert paths.sum_error < 1e-12


def test_everything_is_as_it_was():
    model, x = residual_mlp().double().train(), vectors(2, 4).requires_grad_()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        path_gradients(model, x, squares, by="block")
    with torch.inference_mode():
        assert path_gradients(model, x.detach().clone(), squares).sum_error < 1e-12
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0
