"""Claims about analysis.dynamics and nn.LayerNetwork: the paper's system, and first order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastres
from fastres.analysis.dynamics import (
    by_class,
    convergence,
    fixed_points,
    injections,
    iterate,
    jacobian,
    logistic_map,
    logistic_ode,
    lyapunov_exponents,
    noise_growth,
    predicted_noise,
    propagated_covariance,
    residuals,
)
from fastres.nn import LayerNetwork

WEIGHT = np.array([[0.3, -1.2, -1.95], [0.8, -0.4, -0.87], [-0.5, 0.9, 0.8]])  # w33 as in the paper


def network(**options) -> LayerNetwork:
    torch.manual_seed(0)
    settings = {"in_features": 2, "classes": 2, "width": 3, "layers": 15, **options}
    return LayerNetwork(**settings).double()


def stirred(net: LayerNetwork) -> LayerNetwork:
    with torch.no_grad():
        net.bias.normal_()
        net.weight.normal_()
    return net


def inputs(batch: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_the_network_is_its_formula(shared, residual):
    net = stirred(network(shared=shared, residual=residual))
    x = net.start(inputs())
    states = net.run(x, return_states=True)
    for layer in range(15):
        weight, bias = net.of_layer(layer)
        y = torch.sigmoid(states[layer] @ weight.T + bias)
        assert torch.allclose(states[layer + 1], states[layer] + y if residual else y)
    assert torch.allclose(net(inputs()), net.head(states[-1]))
    net(inputs()).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_shared_layers_run_to_any_depth():
    net = stirred(network())
    x = net.start(inputs())
    states = net.run(x, return_states=True)
    net.layers = 1000
    deep = net.run(x, return_states=True)
    assert torch.equal(deep[:16], states)
    assert len(fastres.trace(net, inputs())) == 1000


def test_bad_networks_are_refused():
    with pytest.raises(ValueError, match="LayerNetwork: layers must be >= 1, got 0"):
        network(layers=0)
    with pytest.raises(ValueError, match=r"LayerNetwork: activation must be one of .* 'step'"):
        network(activation="step")
    with pytest.raises(ValueError, match="LayerNetwork: u must have 2 features per sample"):
        network()(torch.zeros(3, 4, dtype=torch.float64))


def test_residuals_are_the_steps_of_the_stream():
    net = stirred(network())
    y = residuals(net, inputs())
    states = net.run(net.start(inputs()), return_states=True)
    assert torch.allclose(y, states.diff(dim=0))
    moved = [(b - a).abs().mean() for a, b in itertools.pairwise(y)]
    assert convergence(y).tolist() == pytest.approx([m.item() for m in moved])
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    found = by_class(y, classes)
    assert torch.allclose(found.mean[:, 1], y[:, classes == 1].mean(1))
    assert torch.allclose(found.spread[:, 0], y[:, classes == 0].std(1, correction=0))


def test_the_residuals_of_shared_layers_follow_the_logistic_map_exactly():
    net = stirred(network())
    y = residuals(net, inputs()).numpy()  # [T, B, N]
    found = logistic_map(net.weight[0].detach().numpy(), y[0], 14)
    assert found == pytest.approx(y, abs=1e-9)


def test_the_map_converges_to_the_differential_equation_at_first_order():
    start, errors = [0.2, 0.7, 0.4], []
    exact = logistic_ode(WEIGHT, start, [2.0])[-1]
    for steps in (64, 128, 256):
        errors.append(np.abs(logistic_map(WEIGHT, start, steps, 2 / steps)[-1] - exact).max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_corner_of_the_paper_has_its_eigenvalues():
    w = WEIGHT.copy()
    w[0, 2], w[1, 2], w[2, 2] = -1.95, -0.87, 0.8  # section 3: w13, w23 and -w33 = -0.8
    (corner,) = [p for p in fixed_points(w) if p.y.tolist() == [0, 0, 1]]
    assert [value.real for value in corner.eigenvalues] == pytest.approx([-1.95, -0.87, -0.8])
    assert corner.stable
    assert corner.stable_in_network
    assert np.allclose(np.linalg.eigvals(jacobian(w, [0, 0, 1])), [-1.95, -0.87, -0.8])
    late = logistic_map(w, [1e-3, 1e-3, 1 - 1e-3], 60)[-1]
    assert late == pytest.approx([0, 0, 1], abs=1e-9)


def test_fixed_points_rest_and_their_eigenvalues_are_those_of_the_jacobian():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(20):
        w = random.normal(size=(3, 3))
        points = fixed_points(w)
        assert sum(set(p.y) <= {0.0, 1.0} for p in points) == 8
        for point in points:
            assert np.abs(point.y * (1 - point.y) * (w @ point.y)).max() < 1e-12
            wanted = np.sort_complex(np.linalg.eigvals(jacobian(w, point.y)))
            assert np.sort_complex(point.eigenvalues) == pytest.approx(wanted, abs=1e-9)
            inside += bool(point.interior)
    assert inside > 10


def test_a_multiplier_of_the_map_is_what_a_small_step_off_the_point_grows_by():
    w = np.array([[-2.0, 1.0], [-3.0, 0.5]])
    for point in fixed_points(w):
        if len(point.interior) == 1:
            free = int(((point.y > 0) & (point.y < 1)).argmax())
            off = point.y.copy()
            off[free] += 1e-7
            grown = (logistic_map(w, off, 1)[-1] - point.y)[free] / 1e-7
            assert grown == pytest.approx(point.interior[0].real + 1, abs=1e-5)
    assert [p.stable for p in fixed_points([[-1.0]])] == [False, False]


def test_a_singular_system_lists_its_isolated_points_only():
    points = fixed_points(np.zeros((2, 2)))
    assert len(points) == 4


def test_the_linear_prediction_is_right_for_small_noise_and_not_for_large():
    for residual in (True, False):
        net = stirred(network(residual=residual, width=8, layers=6, shared=False))
        x = net.start(inputs(40))
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
        small, guess = noise_growth(net, x, 1e-6 * noise), predicted_noise(net, x, 1e-6 * noise)
        assert torch.allclose(small.growth, guess.growth, rtol=1e-4)
        assert torch.allclose(small.variance, guess.variance, rtol=1e-4)
        large, guess = noise_growth(net, x, 3 * noise), predicted_noise(net, x, 3 * noise)
        assert (large.growth[-1] / guess.growth[-1] - 1).abs() > 0.05
        assert small.growth[0] == 1


def test_an_mlp_of_sigmoids_contracts_noise_and_the_residual_network_carries_it():
    results = {}
    for residual in (True, False):
        net = network(residual=residual, width=16, layers=15)
        x = net.start(inputs(40))
        noise = 0.1 * torch.randn(
            x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)
        )
        results[residual] = noise_growth(net, x, noise)
        assert injections(net, x, noise)[0] == pytest.approx(results[residual].growth[-1].item())
    assert results[False].growth[-1] < 1e-3
    assert results[True].growth[-1] > 0.1
    assert (results[False].growth.diff() < 0).all()


def test_the_covariance_is_that_of_many_small_draws():
    net = stirred(network(width=4, layers=5, shared=False))
    x = net.start(inputs(1))[0]
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    covariance = propagated_covariance(net, x, root @ root.T)
    draws = 20_000
    z = torch.randn(draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    late = net.run(x + 1e-5 * z @ root.T).detach()
    measured = torch.cov((late - late.mean(0)).T) / 1e-10
    assert torch.allclose(measured, covariance[-1], atol=0.05 * covariance[-1].abs().max().item())
    assert covariance.shape == (6, 4, 4)


def test_lyapunov_exponents_of_linear_layers_are_the_logarithms_of_their_eigenvalues():
    net = network(width=2, layers=400, activation="identity")
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[[-0.5, 1.0], [0.0, -0.9]]], dtype=torch.float64))
    x = torch.zeros(2, dtype=torch.float64)
    found = lyapunov_exponents(net, x)  # of I + W: 0.5 and 0.1
    assert found.tolist() == pytest.approx([math.log(0.5), math.log(0.1)], abs=0.02)


def test_repeating_a_contraction_ends_at_its_fixed_point():
    torch.manual_seed(0)
    block = nn.Linear(5, 5).double()
    with torch.no_grad():
        q = torch.linalg.qr(block.weight).Q
        scales = torch.tensor([0.9, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
        block.weight.copy_(q @ torch.diag(scales) @ q.T)
        exact = torch.linalg.solve(torch.eye(5).double() - block.weight, block.bias)
    found = iterate(block, torch.randn(3, 5, dtype=torch.float64), steps=300)
    assert found.fixed.all()
    assert torch.allclose(found.point, exact.expand(3, 5), atol=1e-8)
    assert found.contraction.tolist() == pytest.approx([0.9] * 3, rel=1e-3)
    apart = iterate(lambda x: 1.1 * x, torch.ones(2, 5), steps=20)
    assert not apart.fixed.any()
    assert apart.contraction.tolist() == pytest.approx([1.1] * 2, rel=1e-3)
    assert iterate(lambda x: x, torch.ones(2, 5)).contraction.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logistic_map(WEIGHT, [0.5, 0.5], 3), "logistic_map: weight and y must be"),
        (lambda: logistic_map(WEIGHT, [0.5, 0.5, 2], 3), "logistic_map: y must be from 0 to 1"),
        (lambda: logistic_map(WEIGHT, [0.5] * 3, -1), "logistic_map: steps must be >= 0, got -1"),
        (lambda: logistic_ode(WEIGHT, [0.5] * 3, [2, 1]), "logistic_ode: start must be .N. and"),
        (lambda: fixed_points(np.eye(11)), r"fixed_points: weight must be .* got \[11, 11\]"),
        (lambda: convergence(torch.ones(1, 2, 3)), "convergence: y must be .2 or more"),
        (lambda: by_class(torch.ones(2, 2, 3), torch.tensor([0, 2])), r"none of \[1\]"),
        (lambda: by_class(torch.ones(2, 2, 3), torch.tensor([0])), "by_class: y and classes must"),
        (lambda: iterate(lambda x: x[:1], torch.ones(2, 3)), "iterate: block must keep the shape"),
        (lambda: iterate(lambda x: x, torch.ones(2, 3), steps=1), "iterate: steps must be >= 2"),
        (
            lambda: noise_growth(network(), torch.ones(2, 3), torch.ones(1, 3)),
            "noise_growth: x and noise must have one shape",
        ),
        (
            lambda: residuals(fastres.nn.cifar_resnet(8), torch.zeros(1, 3, 8, 8)),
            "residuals: model must have blocks of one shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
