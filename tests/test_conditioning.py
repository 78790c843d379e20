"""Claims about conditioning at zero: theorem 1 of Li et al. 2016, and the table of its setup."""

import math
import os
import statistics

import pytest
import torch

from fastres.analysis.conditioning import (
    Eigenvalues,
    FunctionHessian,
    ZeroHessian,
    eigenvalues,
    squared_loss,
    stationary_order,
)
from fastres.data import read
from fastres.nn import ShortcutNetwork
from fastres.studies.li_data import Task, task, whitened

ROOT = os.environ.get("FASTRES_DATA")
SMOOTH = ("identity", "tanh", "silu", "gelu", "gelu_tanh")


def problem(width: int, samples: int = 40, seed: int = 0) -> Task:
    source = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, samples, width, dtype=torch.float64, generator=source)
    return Task(whitened(x, width), y)


def loss_of(network: ShortcutNetwork, t: Task):
    """The loss as a function of the weights."""

    def loss(weights):
        return squared_loss(t.y)(torch.func.functional_call(network, {"weights": weights}, t.x))

    return loss


def zero_of(network: ShortcutNetwork) -> torch.Tensor:
    return torch.zeros_like(network.weights, dtype=torch.float64)


def measured(network: ShortcutNetwork, t: Task, weights=None) -> torch.Tensor:
    """The Hessian by autograd, at zero unless there are weights."""
    point = zero_of(network) if weights is None else weights
    return FunctionHessian(loss_of(network, t), point).dense()


@pytest.mark.parametrize("units", [1, 2, 5])
@pytest.mark.parametrize("matrices", [1, 2, 3, 4])
def test_the_closed_form_is_the_hessian_of_autograd(matrices, units):
    t, network = problem(4), ShortcutNetwork(4, units, matrices)
    exact = ZeroHessian(network, t.x, t.y).dense()
    torch.testing.assert_close(exact, measured(network, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pre", [*SMOOTH, "relu", "sigmoid"])
@pytest.mark.parametrize("other", SMOOTH)
@pytest.mark.parametrize("matrices", [1, 2])
def test_the_closed_form_holds_for_activations_in_every_place(matrices, other, pre):
    t = problem(3)
    network = ShortcutNetwork(3, 3, matrices, pre=pre, mid=other, post=other)
    exact = ZeroHessian(network, t.x, t.y).dense()
    torch.testing.assert_close(exact, measured(network, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("units", [1, 3])
def test_with_2_matrices_the_eigenvalues_are_plus_and_minus_singular_values_d_r_times(units):
    t, network = problem(4), ShortcutNetwork(4, units, 2)
    singular = torch.linalg.svdvals(t.xx - t.yx)
    spectrum = ZeroHessian(network, t.x, t.y).spectrum()
    expected = torch.cat((-singular, singular.flip(0)))
    torch.testing.assert_close(spectrum.values, expected, rtol=1e-12, atol=0)
    assert spectrum.multiplicities.tolist() == [4 * units] * 8
    found = eigenvalues(measured(network, t))
    torch.testing.assert_close(spectrum.all().values, found.values, rtol=0, atol=1e-12)
    assert found.index == spectrum.all().index == 0.5


def test_with_2_matrices_the_condition_number_is_the_same_from_1_to_64_units():
    t = problem(2)
    found = [
        eigenvalues(ZeroHessian(ShortcutNetwork(2, units, 2), t.x, t.y).dense()).condition
        for units in (1, 2, 4, 8, 16, 32, 64)
    ]
    wanted = ZeroHessian(ShortcutNetwork(2, 64, 2), t.x, t.y).condition()
    assert found == pytest.approx([wanted] * 7, rel=1e-10)


@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("matrices", [3, 4])
def test_with_3_matrices_or_more_the_hessian_is_zero(matrices, units):
    t, network = problem(3), ShortcutNetwork(3, units, matrices)
    assert not measured(network, t).any()
    assert ZeroHessian(network, t.x, t.y).spectrum().values.tolist() == [0]
    assert math.isnan(ZeroHessian(network, t.x, t.y).condition())


@pytest.mark.parametrize("mid", ["identity", "tanh"])
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("matrices", [1, 2, 3, 4])
def test_zero_is_stationary_to_the_order_n_minus_1(matrices, units, mid):
    t, network = problem(3), ShortcutNetwork(3, units, matrices, mid=mid)
    order = stationary_order(loss_of(network, t), zero_of(network))
    assert order == matrices - 1 == ZeroHessian(network, t.x, t.y).order


def test_a_point_that_is_flat_in_all_directions_has_the_highest_order_looked_for():
    assert stationary_order(lambda v: (v**5).sum(), torch.zeros(3).double()) == 4
    assert stationary_order(lambda v: (v**5).sum(), torch.zeros(3).double(), most=3) == 3


def test_with_1_matrix_the_condition_number_is_1_for_1_unit_and_grows_with_their_number():
    """For one draw of such data the reference has 1, 339, 860, 2040, 4419; it varies widely."""
    found = {units: [] for units in (1, 2, 16)}
    for seed in range(5):
        t = problem(4, seed=seed)
        for units, values in found.items():
            network = ShortcutNetwork(4, units, 1)
            values.append(ZeroHessian(network, t.x, t.y).condition())
    assert found[1] == pytest.approx([1] * 5, rel=1e-9)
    assert min(found[2]) > 3
    assert statistics.median(found[16]) > 10 * statistics.median(found[2])


@pytest.mark.parametrize("matrices", [1, 2])
def test_tanh_in_the_middle_leaves_the_condition_number(matrices):
    t = problem(4)
    linear = ZeroHessian(ShortcutNetwork(4, 3, matrices), t.x, t.y)
    curved = ZeroHessian(ShortcutNetwork(4, 3, matrices, mid="tanh"), t.x, t.y)
    assert curved.condition() == pytest.approx(linear.condition(), rel=1e-12)


def test_relu_in_the_middle_is_named_and_halves_the_eigenvalues():
    t = problem(4)
    linear = ZeroHessian(ShortcutNetwork(4, 3, 2), t.x, t.y)
    with pytest.warns(UserWarning, match=r"mid is relu, which has no derivative at 0"):
        bent = ZeroHessian(ShortcutNetwork(4, 3, 2, mid="relu"), t.x, t.y)
    torch.testing.assert_close(bent.spectrum().values, linear.spectrum().values / 2)
    assert bent.condition() == pytest.approx(linear.condition(), rel=1e-12)


def test_what_half_the_slope_of_relu_describes_is_the_mean_over_both_signs():
    """relu is a half of the identity and a half of |.|; the odd part is what a Hessian can see."""
    t, network = problem(4), ShortcutNetwork(4, 3, 2, mid="relu")
    loss, source = loss_of(network, t), torch.Generator().manual_seed(0)
    v = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=source)
    turned = v * torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
    step = 1e-3

    def bend(u):  # the second derivative along a ray, which exists
        return 2 * (loss(step * u) - loss(0 * u)) / step**2

    with pytest.warns(UserWarning, match="mid is relu"):
        exact = ZeroHessian(network, t.x, t.y)
    wanted = v.flatten() @ (exact @ v.flatten())
    assert float(bend(v) - bend(turned)) / 2 == pytest.approx(float(wanted), rel=1e-4)


# The reference: 10 whitened components of the MNIST test images, one-hot targets. Signs of
# components are arbitrary, and move the condition number: these are the ones it was made with.
SIGNS = torch.tensor([1, 1, -1, 1, -1, -1, -1, -1, -1, 1], dtype=torch.float64)
DEPTHS = (2, 4, 8, 12)
needs_mnist = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")


@pytest.fixture(scope="module")
def mnist() -> Task:
    made = task(*read("mnist")[1])
    return Task(made.x * SIGNS, made.y)


def initial(mnist: Task, depth: int, seed: int = 0, **options) -> Eigenvalues:
    torch.manual_seed(seed)
    network = ShortcutNetwork(10, depth // options["matrices"], **options).double()
    few = mnist.condensed()
    return eigenvalues(measured(network, few, network.weights.detach()))


@needs_mnist
def test_ten_samples_have_the_moments_of_all(mnist):
    few = mnist.condensed()
    torch.testing.assert_close(few.xx, mnist.xx)
    torch.testing.assert_close(few.yx, mnist.yx)


@needs_mnist
def test_the_data_have_the_moments_of_the_reference(mnist):
    torch.testing.assert_close(mnist.xx, torch.eye(10, dtype=torch.float64))
    wanted = [0.267, 0.257, 0.251, 0.209, 0.207, 0.161, 0.123, 0.052, 0.036, 0]
    assert torch.linalg.svdvals(mnist.yx).tolist() == pytest.approx(wanted, abs=6e-4)
    assert mnist.least == pytest.approx(0.334, abs=6e-4)
    assert float(squared_loss(mnist.y)(mnist.x)) == pytest.approx(5.18, abs=6e-3)


@needs_mnist
def test_the_condition_number_at_zero_is_in_the_range_of_the_reference(mnist):
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        signs = torch.randint(0, 2, (10,), generator=source).double() * 2 - 1
        found.append(float(torch.linalg.cond(mnist.xx - mnist.yx * signs)))
    assert min(found) > 1.41 * 0.98
    assert max(found) < 1.65 * 1.02
    assert statistics.median(found) == pytest.approx(1.56, rel=0.02)


ZERO_2 = {"matrices": 2}
ORTHOGONAL = {"matrices": 1, "shortcut": False, "initialisation": "orthogonal"}
XAVIER = {"matrices": 1, "shortcut": False, "initialisation": "xavier"}


@needs_mnist
def test_with_zero_weights_the_table_of_the_reference_holds_within_2_percent(mnist):
    def found(matrices):
        nets = [ShortcutNetwork(10, depth // matrices, matrices) for depth in DEPTHS]
        spectra = [ZeroHessian(net, mnist.x, mnist.y).spectrum().all() for net in nets]
        return [spectrum.condition_tenth for spectrum in spectra]

    assert found(1) == pytest.approx((3.70, 9.22, 20.3, 31.3), rel=0.02)
    assert found(2) == pytest.approx([1.413] * 4, rel=0.02)


@needs_mnist
@pytest.mark.parametrize(
    ("options", "wanted"),
    [(ZERO_2, (1.414, 1.414, 1.415, 1.415)), (ORTHOGONAL, (3.7, 9.1, 20, 31.1))],
    ids=["2-shortcut", "orthogonal"],
)
def test_as_initialised_the_table_of_the_reference_holds_within_2_percent(mnist, options, wanted):
    found = [initial(mnist, depth, **options).condition_tenth for depth in DEPTHS]
    assert found == pytest.approx(wanted, rel=0.02)


@needs_mnist
def test_with_xavier_the_order_of_magnitude_of_the_reference_holds(mnist):
    for depth, wanted in zip(DEPTHS, (44.5, 2.3e3, 3.6e5, 3.1e7), strict=True):
        drawn = [initial(mnist, depth, seed, **XAVIER).condition_tenth for seed in range(3)]
        # both are medians of 3 draws, which at depth 12 differ by a factor of 5 among themselves
        assert abs(math.log10(statistics.median(drawn) / wanted)) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(40, 3)}, r"y must have the shape of x, .*\[40, 4\], got \[40, 3\]"),
        ({"x": torch.ones(40, 3)}, r"x must have shape \[B, 4\], got \[40, 3\]"),
        ({"x": torch.full((40, 4), torch.inf)}, "x must be finite, got inf or nan"),
        ({"y": torch.full((40, 4), torch.nan)}, "y must be finite, got inf or nan"),
        ({"x": torch.ones(40, 4)}, "x must have a covariance of full rank, got rank 1 of 4"),
        ({"network": ShortcutNetwork(4, 2, 2, mid="sigmoid")}, "mid must be 0 at 0, got sigmoid"),
        ({"network": ShortcutNetwork(4, 2, 2, shortcut=False)}, "network must have shortcuts"),
        ({"network": ShortcutNetwork(4, 0, 2)}, "network must have >= 1 unit, got 0"),
    ],
)
def test_what_has_no_hessian_at_zero_is_refused(change, message):
    t = problem(4)
    with pytest.raises(ValueError, match=f"zero_hessian: {message}"):
        ZeroHessian(**{"network": ShortcutNetwork(4, 2, 2), "x": t.x, "y": t.y, **change})


def test_a_hessian_too_large_for_memory_says_its_size_and_the_way_without_a_matrix():
    t = problem(4)
    operator = ZeroHessian(ShortcutNetwork(4, 5000, 2), t.x, t.y)
    with pytest.raises(ValueError, match=r"at most 2 GiB, got 191 GiB for 160000 x 160000; .*@ v"):
        operator.dense()


def test_components_that_do_not_vary_cannot_be_whitened():
    x = torch.randn(20, 3) @ torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"components must be 1 to 3, the rank .*, got 4"):
        whitened(x, 4)


def test_targets_wider_than_the_network_are_refused():
    images, labels = torch.randint(0, 255, (30, 1, 3, 3)).numpy(), torch.arange(30).numpy() % 6
    with pytest.raises(ValueError, match=r"components must be at least the classes, 6, .* got 5"):
        task(images, labels, 5)


def test_eigenvalues_know_their_condition_numbers_and_index():
    found = Eigenvalues(torch.tensor([-2.0, -1e-17, 0.5, 1, 4], dtype=torch.float64))
    assert (found.largest, found.smallest, found.index) == (4, 1e-17, 0.2)
    assert found.tenth == pytest.approx(0.4 * 0.5)
    assert found.condition_tenth == pytest.approx(20)
    assert math.isinf(Eigenvalues(torch.tensor([0.0, 1.0]).double()).condition)
    assert math.isnan(Eigenvalues(torch.zeros(2).double()).condition)


def test_the_tenth_percentile_is_that_of_torch_and_has_no_largest_number_of_eigenvalues():
    for count in (1, 2, 10, 11, 57):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
        wanted = torch.quantile(values.abs(), 0.1).item()
        assert Eigenvalues(values).tenth == pytest.approx(wanted, rel=1e-12)
    assert Eigenvalues(torch.ones(1, dtype=torch.float64).expand((1 << 24) + 1)).tenth == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_that_are_rounding_are_not_below_zero(dtype):
    factor = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = eigenvalues(factor @ factor.mT)  # of rank 40
    assert (found.values < 0).any()
    assert found.index == 0


def test_a_matrix_of_no_real_floating_dtype_has_no_eigenvalues():
    with pytest.raises(TypeError, match=r"matrix must have a floating dtype, got torch\.complex64"):
        eigenvalues(torch.eye(2) * 1j)


@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (2, 2)])
def test_what_is_no_finite_square_matrix_has_no_eigenvalues(shape):
    with pytest.raises(ValueError, match="eigenvalues: matrix must"):
        eigenvalues(torch.full(shape, torch.nan))
