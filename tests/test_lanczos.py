"""Claims about operators and the Lanczos quadrature: they find what a dense matrix has."""

import numpy as np
import pytest
import torch

from fastres.analysis.conditioning import (
    FunctionHessian,
    SymmetricOperator,
    extreme_eigenvalues,
    lanczos,
)


class Dense(SymmetricOperator):
    """A matrix that counts its products."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.count = matrix, 0

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return vectors @ self.matrix


def with_eigenvalues(values) -> Dense:
    values = torch.as_tensor(values, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(len(values), len(values), dtype=torch.float64, generator=source)
    basis = torch.linalg.qr(noise).Q
    matrix = basis @ values.diag() @ basis.mT
    return Dense((matrix + matrix.mT) / 2)


def test_as_many_steps_as_eigenvalues_find_every_one_of_them():
    values = np.linspace(-3, 5, 30)
    found = lanczos(with_eigenvalues(values), steps=100, draws=2)
    np.testing.assert_allclose(found.nodes, np.stack([values, values]), atol=1e-9)
    np.testing.assert_allclose(found.weights.sum(1), 1)


def test_few_steps_find_the_ends_and_all_draws_share_their_products():
    operator = with_eigenvalues([-9, *np.linspace(-1, 2, 198), 8])
    found = lanczos(operator, steps=20, draws=5)
    assert operator.count == 20
    assert found.smallest == pytest.approx(-9, rel=1e-6)
    assert found.largest == pytest.approx(8, rel=1e-6)


def test_trace_and_index_are_within_their_errors():
    values = np.concatenate([np.linspace(-2, -1, 60), np.linspace(1, 3, 140)])
    found = lanczos(with_eigenvalues(values), steps=40, draws=30)
    assert abs(found.trace - values.sum()) < 4 * found.trace_error
    assert abs(found.index - 0.3) < 4 * found.index_error
    assert found.index_error < 0.02
    assert np.isnan(lanczos(with_eigenvalues(values), draws=1).trace_error)


def test_the_density_is_that_of_the_eigenvalues():
    values = np.concatenate([np.full(150, -1.0), np.full(50, 2.0)])
    found = lanczos(with_eigenvalues(values), steps=10, draws=40)
    points = np.linspace(-3, 4, 701)
    exact = (
        np.exp(-0.5 * ((points[:, None] - values) / 0.2) ** 2).mean(1) / 0.2 / np.sqrt(2 * np.pi)
    )
    density = found.at(points, 0.2)
    assert density.sum() * 0.01 == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(density, exact, atol=0.1)


def test_an_operator_with_two_eigenvalues_ends_the_recurrence_after_two_steps():
    found = lanczos(with_eigenvalues([1.0] * 20 + [3.0] * 20), steps=10)
    assert np.isfinite(found.nodes).all()
    used = found.nodes[found.weights > 1e-9]
    np.testing.assert_allclose(used, np.tile([1.0, 3.0], 4), rtol=1e-9)


def test_the_ends_are_eigenvalues_where_the_recurrence_ends_early():
    for value in (-2.0, 3.0):
        found = lanczos(with_eigenvalues([value] * 9), steps=5)
        assert found.smallest == pytest.approx(value)
        assert found.largest == pytest.approx(value)


def test_the_zero_operator_has_index_and_trace_zero():
    found = lanczos(Dense(torch.zeros(5, 5)))
    assert found.trace == found.index == found.largest == 0


@pytest.mark.parametrize(("which", "wanted"), [("LA", [6, 7]), ("SA", [-9, 0]), ("LM", [-9, 7])])
def test_extreme_eigenvalues_are_those_of_scipy(which, wanted):
    pytest.importorskip("scipy")
    operator = with_eigenvalues([-9, *range(8)])
    np.testing.assert_allclose(extreme_eigenvalues(operator, 2, which), wanted, atol=1e-9)


def test_scipy_multiplies_vectors_and_matrices():
    pytest.importorskip("scipy")
    operator = with_eigenvalues(range(6))
    made, x = operator.to_scipy(), np.random.default_rng(0).standard_normal((6, 3))
    np.testing.assert_allclose(made @ x, operator.matrix.numpy() @ x)
    np.testing.assert_allclose(made @ x[:, 0], operator.matrix.numpy() @ x[:, 0])
    np.testing.assert_allclose(made.T @ x, operator.matrix.numpy() @ x)


@pytest.mark.filterwarnings("error")
def test_scipy_multiplies_reversed_and_read_only_arrays():
    pytest.importorskip("scipy")
    operator = with_eigenvalues(range(6))
    made, x = operator.to_scipy(), np.arange(6.0)
    x.setflags(write=False)
    np.testing.assert_allclose(made @ x, operator.matrix.numpy() @ x)
    np.testing.assert_allclose(made @ x[::-1], operator.matrix.numpy() @ x[::-1])


def test_curvlinops_takes_an_operator_and_ours_take_one_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    operator = with_eigenvalues(np.linspace(-1, 3, 40))
    made = operator.to_curvlinops()
    torch.testing.assert_close(made @ torch.eye(40).double(), operator.matrix)
    torch.manual_seed(0)
    assert float(curvlinops.hutchinson_trace(made, 30)) == pytest.approx(40, abs=10)
    np.testing.assert_allclose(lanczos(made).nodes, lanczos(operator).nodes, atol=1e-9)
    assert extreme_eigenvalues(made)[0] == pytest.approx(3)


def test_the_hessian_of_a_function_of_several_tensors_is_that_of_autograd():
    source = torch.Generator().manual_seed(0)
    point = [torch.randn(n, dtype=torch.float64, generator=source) for n in (3, 2)]

    def loss(a, b):
        return a.sin().prod() * b.exp().sum() + (a[:2] * b).sum()

    whole = torch.cat(point)
    expected = torch.autograd.functional.hessian(lambda v: loss(v[:3], v[3:]), whole)
    operator = FunctionHessian(loss, *point)
    torch.testing.assert_close(operator.dense(chunk=2), expected)
    torch.testing.assert_close(operator @ whole, expected @ whole)
    leaf = whole.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf[:3], leaf[3:]), leaf)
    torch.testing.assert_close(operator.gradient(), gradient)


def test_a_number_is_a_point_as_well():
    operator = FunctionHessian(lambda a, b: a**3 * b.sum(), torch.tensor(2.0), torch.ones(2))
    torch.testing.assert_close(operator.dense()[0], torch.tensor([24.0, 12.0, 12.0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FunctionHessian(torch.sum), ValueError, "point must have at least one tensor"),
        (lambda: FunctionHessian(torch.sum, torch.arange(3)), TypeError, "one floating dtype"),
        (lambda: FunctionHessian(torch.sin, torch.ones(3)), ValueError, r"scalar, got shape \[3\]"),
        (lambda: Dense(torch.eye(3)) @ torch.ones(4), ValueError, r"shape \[3\] or \[3, K\], got"),
        (lambda: lanczos(Dense(torch.eye(3)), steps=0), ValueError, "steps must be >= 1, got 0"),
        (lambda: lanczos(Dense(torch.eye(3)), draws=0), ValueError, "draws must be >= 1, got 0"),
        (lambda: lanczos(Dense(torch.eye(3) * torch.inf)), ValueError, "products must be finite"),
        (lambda: extreme_eigenvalues(Dense(torch.eye(3)), 3), ValueError, "count must be 1 to 2"),
        (lambda: extreme_eigenvalues(Dense(torch.eye(3)), 1, "SM"), ValueError, "which must be LA"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
