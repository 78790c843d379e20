"""Predicted changes of slopes are sums over paths, and what a step on the weights does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from models import cifar_resnet, residual_mlp
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.scale_growth import ScaleGrowth, scale_growth
from fastres.gates import gate


class OneSkip(nn.Module):
    """The network of Theorem 3: p = 4 layers, a skip over two of them, paths of m = 2 and p."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (rows, columns) in {"a": (6, 5), "b": (7, 6), "c": (6, 7), "d": (3, 6)}.items():
            weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(weight / columns**0.5))

    def long(self, h: Tensor) -> Tensor:
        return F.relu(F.relu(h @ self.b.T) @ self.c.T)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x @ self.a.T)
        return (h + self.long(h)) @ self.d.T


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def linear(out: Tensor) -> Tensor:
    return (out * torch.arange(1, out[0].numel() + 1)).mean()


def parts_of_one_skip(model: OneSkip, x: Tensor) -> tuple[Tensor, Tensor]:
    """g_m and g_p: gradients of the loss on paths past the two layers, and through them."""
    found = []
    for through in (False, True):
        h = F.relu(x @ model.a.T)
        value = linear((model.long(h) if through else h) @ model.d.T)
        parts = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        found.append(nn.utils.parameters_to_vector(parts))
    return found[0], found[1]


def test_of_one_skip_the_prediction_is_the_formula_of_the_paper():
    model = OneSkip()
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    short, long = parts_of_one_skip(model, x)
    found = scale_growth(model, x, linear, step=1e-6)
    assert found.square == pytest.approx((short + long).square().sum().item(), rel=1e-12)
    skipped = long.square().sum() + long @ short
    assert found.through.tolist() == pytest.approx([skipped.item()], rel=1e-12)
    assert found.predicted.tolist() == pytest.approx([-1e-6 * skipped.item()], rel=1e-12)
    m, p = 2, 4
    both = m * short.square().sum() + p * long.square().sum() + (m + p) * (long @ short)
    assert found.predicted_all == pytest.approx(-1e-6 * both.item(), rel=1e-12)
    assert found.measured.tolist() == pytest.approx(found.predicted.tolist(), rel=1e-4)
    assert found.measured_all == pytest.approx(found.predicted_all, rel=1e-4)


def test_each_block_is_given_the_paths_through_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *[Plain() for _ in range(3)], nn.Linear(5, 2)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    weights = list(model.parameters())
    paths: dict[tuple[int, ...], Tensor] = {}
    for opened in product((0, 1), repeat=3):
        # of a linear network, a sum over subsets gives the paths through exactly these blocks
        total = torch.zeros(())
        for some in product(*[(0, 1) if o else (0,) for o in opened]):
            with gate(model, {str(1 + i): float(s) for i, s in enumerate(some)}):
                value = linear(model(x))
            total = total + (-1) ** (sum(opened) - sum(some)) * value
        grads = torch.autograd.grad(total, weights, materialize_grads=True)
        paths[opened] = nn.utils.parameters_to_vector(grads)
    g = torch.stack(list(paths.values())).sum(0)
    found = scale_growth(model, x, linear, step=0.1)
    for block in range(3):
        own = torch.stack([v for k, v in paths.items() if k[block]]).sum(0)
        assert found.through[block].item() == pytest.approx((own @ g).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("make", "shape"), [(residual_mlp, (6, 4)), (lambda: cifar_resnet().double(), (4, 3, 8, 8))]
)
def test_a_small_step_does_what_is_predicted_and_the_model_is_left_alone(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
):
    torch.manual_seed(0)
    model = make().double().train()
    x = torch.randn(shape, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    found = scale_growth(model, x, linear, step=1e-7)
    torch.testing.assert_close(found.measured, found.predicted, rtol=1e-3, atol=1e-12)
    assert found.measured_all == pytest.approx(found.predicted_all, rel=1e-3)
    assert found.slope.abs().min() > 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_slopes_are_derivatives_by_the_log_of_the_scales():
    model = OneSkip()
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    short, long = (
        linear((model.long(h) if through else h) @ model.d.T).item()
        for h in [F.relu(x @ model.a.T)]
        for through in (False, True)
    )
    found = scale_growth(model, x, linear, step=0.1)
    assert found.slope.tolist() == pytest.approx([long], rel=1e-12)
    assert found.slope_all == pytest.approx(2 * short + 4 * long, rel=1e-12)


def test_only_the_given_weights_move():
    model = OneSkip()
    x = torch.randn(9, 5, dtype=torch.float64)
    found = scale_growth(model, x, linear, 0.1, weights=[model.b])
    assert isinstance(found, ScaleGrowth)
    assert found.through.item() == pytest.approx(found.square)  # every path of b is through it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: scale_growth(m, x, linear, 0.0), "step must be above 0 and finite, got 0.0"),
        (lambda m, x: scale_growth(m, x, linear, 1.0, []), "weights must hold at least one"),
        (
            lambda m, x: scale_growth(nn.Linear(4, 2), x, linear, 1.0),
            "model must contain a residual add, none in Linear",
        ),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=f"scale_growth: {message}"):
        call(residual_mlp(), torch.ones(2, 4))
