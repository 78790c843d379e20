"""The gradient by path length is that of all 2^L paths, one by one, in any network."""

from __future__ import annotations

import math

import pytest
import torch
from models import InPlaceBlock, cifar_resnet, residual_mlp, torchvision
from path_models import (
    Scale,
    SwitchBlock,
    SwitchPadded,
    by_length,
    enumerate_paths,
    images,
    is_once,
    nested,
    squares,
    switch_mlp,
    two_layers,
    vectors,
)
from torch import Tensor, nn

from fastres.nn import ResidualMLP
from fastres.ops import residual_add
from fastres.paths import path_gradients
from fastres.sites import add


def ordinary(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(squares(model(leaf)), leaf)[0]


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
