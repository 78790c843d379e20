"""Claims about the initialisations: each has the variances of its paper, at any depth and width."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fastres.nn import INITIALISATIONS, ResidualMLP, ResidualStack, ShortcutNetwork, initialise
from fastres.training import Recipe, Stepper

GATED = ("skipinit", "rezero")
D, H, L = 48, 96, 40


def stack(name: str, activation: str = "relu") -> ResidualStack:
    torch.manual_seed(0)
    return ResidualStack(D, L, H, activation, initialisation=name, gated=name in GATED)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("xavier", 2 / (D + H), 2 / (D + H)),
        ("zero", 2e-4 / (D + H), 2e-4 / (D + H)),
        ("he", 2 / D, 2 / H),
        ("fixup", 2 / D / L, 0),
        ("skipinit", 2 / D, 2 / H),
        ("rezero", 2 / (D + H), 2 / (D + H)),
        ("scaled", 2 / D, 1 / H / L),
    ],
)
def test_the_matrices_have_the_variance_of_the_paper(name, first, last):
    drawn = stack(name)
    assert drawn.w1.var().item() == pytest.approx(first, rel=0.02)
    assert drawn.w2.var().item() == pytest.approx(last, rel=0.02)
    assert not drawn.b1.any()
    assert not drawn.b2.any()


def test_orthogonal_matrices_are_orthogonal_and_differ_from_block_to_block():
    w1 = stack("orthogonal").w1.detach()  # [L, H, D], H > D
    torch.testing.assert_close(w1.mT @ w1, torch.eye(D).expand(L, D, D), atol=1e-5, rtol=0)
    assert (w1[0] - w1[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["fixup", *GATED])
def test_a_branch_that_starts_at_zero_makes_the_stack_the_identity(name):
    x = torch.randn(5, D)
    assert torch.equal(stack(name)(x), x)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_every_initialisation_trains_a_residual_mlp(name):
    torch.manual_seed(0)
    model = ResidualMLP(8, 4, 16, 30, initialisation=name, gated=name in GATED)
    x, y = torch.randn(64, 8), torch.arange(64) % 4
    step = Stepper(model, Recipe(lr=3e-3), 80)
    losses = [step(x, y).item() for _ in range(80)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_gain_is_that_of_the_activation():
    assert stack("he", "tanh").w1.var().item() == pytest.approx((5 / 3) ** 2 / D, rel=0.02)


def test_fixup_scales_by_the_number_of_matrices_in_a_branch():
    torch.manual_seed(0)
    network = ShortcutNetwork(60, 50, 3, mid="relu", initialisation="fixup")
    inner = network.weights[:, :2].var().item()
    assert inner == pytest.approx(2 / 60 * 50 ** (-2 / 4), rel=0.02)  # std times L^(-1 / (2n - 2))
    assert not network.weights[:, 2].any()


@pytest.mark.parametrize(
    ("name", "matrix", "variance"), [("fixup", 0, 2 / D), ("scaled", 1, 1 / H)]
)
def test_depth_is_that_of_all_stacks_together(name, matrix, variance):
    torch.manual_seed(0)
    both = torch.nn.Sequential(*(ResidualStack(D, L, H) for _ in range(2)))
    initialise(both, name)
    for each in both:
        weight = (each.w1, each.w2)[matrix]
        assert weight.var().item() == pytest.approx(variance / (2 * L), rel=0.02)


def test_a_trained_gate_scales_what_its_branch_adds():
    drawn = stack("skipinit").double()
    with torch.no_grad():
        drawn.gate.copy_(torch.linspace(-1, 1, L))
        drawn.b2.normal_()
    x = torch.randn(5, D, dtype=torch.float64)
    expected = x
    for w1, w2, b2, gate in zip(drawn.w1, drawn.w2, drawn.b2, drawn.gate, strict=True):
        expected = expected + gate * F.linear(F.relu(F.linear(expected, w1)), w2, b2)
    torch.testing.assert_close(drawn(x), expected)


def test_only_branches_are_drawn():
    model = ResidualMLP(8, 4, 16, 3)
    before = model.head.weight.clone()
    initialise(model, "xavier")
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("entry", INITIALISATIONS.values(), ids=lambda entry: entry.name)
def test_every_initialisation_names_its_paper(entry):
    assert entry.name in INITIALISATIONS
    assert any(f"{year}" in entry.paper for year in range(2010, 2021))
    assert entry.what


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"name must be one of xavier, zero, .*, got 'glorot'"):
        ResidualStack(4, 2, initialisation="glorot")


def test_branches_without_a_trained_gate_cannot_start_at_zero():
    with pytest.raises(ValueError, match="module must have trained gates for rezero, got none"):
        ResidualMLP(8, 4, 16, 3, initialisation="rezero")


def test_a_module_without_branches_is_refused():
    with pytest.raises(ValueError, match=r"must have branches of fastres\.nn, got Linear"):
        initialise(nn.Linear(2, 2), "he")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be >= 1, got 0"),
        ({"units": -1}, ValueError, "units must be >= 0, got -1"),
        ({"matrices": 2.0}, TypeError, "matrices must be an integer, got 2.0"),
        ({"mid": "selu"}, ValueError, "mid must be one of identity, relu, .*, got 'selu'"),
    ],
)
def test_a_shortcut_network_refuses_what_is_none(change, error, message):
    with pytest.raises(error, match=f"ShortcutNetwork: {message}"):
        ShortcutNetwork(**{"width": 3, "units": 2, "matrices": 2, **change})


def test_a_shortcut_network_computes_the_formula_of_its_docstring():
    torch.manual_seed(0)
    network = ShortcutNetwork(3, 2, 3, pre="tanh", mid="silu", post="tanh").double()
    nn.init.normal_(network.weights)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = x
    for a, b, c in network.weights:
        f = F.silu(F.silu(expected.tanh() @ a.T) @ b.T) @ c.T
        expected = expected + f.tanh()
    torch.testing.assert_close(network(x), expected)


def test_many_shortcut_networks_run_in_one_call():
    torch.manual_seed(0)
    network = ShortcutNetwork(3, 2, 2, mid="relu", initialisation="xavier")
    weights, x = torch.randn(4, 2, 2, 3, 3), torch.randn(5, 3)
    together = torch.func.functional_call(network, {"weights": weights}, x)
    for one, own in zip(together, weights, strict=True):
        alone = torch.func.functional_call(network, {"weights": own}, x)
        torch.testing.assert_close(one, alone)


def test_without_shortcuts_it_is_a_product_of_matrices():
    torch.manual_seed(0)
    network = ShortcutNetwork(3, 4, 1, shortcut=False, initialisation="xavier")
    product = torch.linalg.multi_dot([w[0] for w in network.weights.flip(0)])
    x = torch.randn(5, 3)
    torch.testing.assert_close(network(x), x @ product.T)
