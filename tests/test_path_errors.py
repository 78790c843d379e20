"""What cannot be decomposed is refused by name; what does not add up is traced to its cause."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from models import Block, InPlaceBlock, residual_mlp
from path_models import squares, switch_mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastres.paths import path_gradients


def run(model: nn.Module | None = None, inputs: object = None, loss=squares, **options):
    torch.manual_seed(1)
    x = torch.randn(2, 3).double() if inputs is None else inputs
    return path_gradients(switch_mlp(4) if model is None else model, x, loss, **options)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda y: y.sum(1), ValueError, r"loss must return a scalar tensor, got shape \[2\]"),
        (lambda y: y.sum().item(), TypeError, "loss must return a scalar tensor, got float"),
        (lambda y: y.detach().sum(), ValueError, "loss must depend on the inputs or the weights"),
        (lambda y: torch.ones(()), ValueError, "loss must depend on the inputs or the weights"),
    ],
)
def test_a_loss_that_is_no_differentiable_scalar_is_refused(loss, error, message):
    with pytest.raises(error, match=f"^path_gradients: {message}"):
        run(loss=loss)


def test_a_loss_that_frees_the_graph_is_refused():
    def backwards(y: Tensor) -> Tensor:
        loss = y.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="the graph of the loss must not be freed before it is"):
        run(loss=backwards)


def test_an_error_of_the_loss_is_the_users():
    with pytest.raises(ZeroDivisionError):
        run(loss=lambda y: y.sum() / (1 // 0))


def test_a_model_without_sites_is_refused():
    with pytest.raises(ValueError, match="model must contain a residual add, found none in Seq"):
        run(nn.Sequential(nn.Linear(3, 3)).double())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        run(3)


class Called(nn.Module):
    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_a_model_that_overrides_its_call_is_refused():
    with pytest.raises(TypeError, match=r"model must run through torch\.nn\.Module\.__call__"):
        run(Called())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": -1}, ValueError, "max_length must be >= 0, got -1"),
        ({"max_length": 5}, ValueError, "max_length must be at most the 4 counted sites between"),
        (
            {"max_length": 3, "where": "3"},
            ValueError,
            "max_length must be at most the 2 counted sites between '3' and the loss, got 3",
        ),
        ({"max_length": 1.0}, TypeError, r"max_length must be an integer, got 1\.0"),
        ({"max_length": True}, TypeError, "max_length must be an integer, got True"),
        ({"chunk": 0}, ValueError, "chunk must be >= 1, got 0"),
        ({"draws": 0}, ValueError, "draws must be >= 1, got 0"),
        ({"method": "exactly"}, ValueError, "method must be one of exact, .* got 'exactly'"),
        ({"by": "site"}, ValueError, "by must be one of length, block, got 'site'"),
        (
            {"by": "block", "method": "energy"},
            ValueError,
            "by must be 'length' for method 'energy'",
        ),
        ({"keep": True, "method": "energy"}, ValueError, "keep must be False for method 'energy'"),
        (
            {"where": "9"},
            ValueError,
            "where must be 'input', 'embedding' or .* got '9', with sites",
        ),
        (
            {"where": "embedding"},
            ValueError,
            r"where must be 'input' or a site for a model that runs no torch\.nn\.Embedding",
        ),
        ({"sites": ["1", "x"]}, ValueError, "sites must be names of sites, got 'x' of '1', '2'"),
        ({"sites": "1"}, TypeError, "sites must be a sequence of names, got '1'"),
        ({"sites": []}, ValueError, "sites must name at least one site, got none"),
        ({"inputs": 3}, TypeError, "inputs must be a tensor, a sequence or a mapping .* got int"),
        (
            {"inputs": torch.ones(2, 3, dtype=torch.int64)},
            ValueError,
            "where must be 'embedding' or a site .* got 'input' with inputs .'torch.int64'",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule_and_value(options, error, message):
    with pytest.raises(error, match=f"^path_gradients: {message}"):
        run(**options)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = switch_mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


def test_an_input_that_does_not_reach_the_loss_is_refused():
    with pytest.raises(ValueError, match=r"where must reach the loss .* got 'input', which has no"):
        run(Detached())
    assert run(Detached(), where="inner.1").sum_error < 1e-12


class Apart(nn.Module):
    """A declared add of two things that have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        from fastres.sites import add

        self.add, self.one = add, nn.Linear(3, 3).double()
        self.weight = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.one(x), self.weight.sin().expand(2, 3))


def test_a_site_without_a_stream_is_no_place_to_begin():
    with pytest.raises(ValueError, match="where must be a site whose two sides come from one"):
        run(Apart(), where="Apart")
    assert run(Apart()).paths == (1,)  # no path from the input goes through the branch


# What does not add up.


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return x


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.abs()


class Signed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x)


@pytest.mark.parametrize(("layer", "cause"), [(Clipped(), "a hook"), (Signed(), "Sign")])
def test_a_backward_pass_that_is_not_linear_is_named(layer, cause):
    model = nn.Sequential(*switch_mlp(3)[:-1], layer, *switch_mlp(3)[1:])
    with pytest.warns(UserWarning, match=f"is not linear in its cotangent: see {cause}$"):
        paths = run(model)
    assert paths.sum_error > 1e-4


class Redrawn(nn.Module):
    """Dropout whose mask is drawn anew in each backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)
        return out


def test_a_backward_pass_that_does_not_repeat_itself_is_named():
    model = nn.Sequential(*switch_mlp(3)[:-1], Redrawn(), *switch_mlp(3)[1:])
    with pytest.warns(UserWarning, match="does not repeat itself: a stochastic layer is recomp"):
        run(model, chunk=1)


def test_checkpoints_that_keep_their_state_add_up():
    class Kept(Redrawn):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = nn.Sequential(*switch_mlp(3)[:-1], Kept(), *switch_mlp(3)[1:])
    for chunk in (1, 7):
        assert run(model, chunk=chunk).sum_error < 1e-12


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.warns(UserWarning, match="the gradient is not finite"):
        run(loss=lambda y: (y - y.detach()).abs().sqrt().sum())


class NumPy(torch.autograd.Function):
    """Its backward leaves torch, which vmap does not follow."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * torch.from_numpy(g.numpy().copy())


class Outside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NumPy.apply(x)


def test_an_operator_without_batching_goes_one_length_at_a_time():
    model = nn.Sequential(*switch_mlp(3)[:-1], Outside(), *switch_mlp(3)[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = run(model, chunk=1)
    with pytest.warns(UserWarning, match="lengths are computed one at a time, not 4: "):
        other = run(model, chunk=4)
    torch.testing.assert_close(one.norms, other.norms)
    assert other.sum_error < 1e-12


def test_an_error_of_the_backward_pass_is_the_users():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("my own")

    class Break(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Broken.apply(x)

    with pytest.raises(RuntimeError, match="my own"):
        run(nn.Sequential(*switch_mlp(2)[:-1], Break(), *switch_mlp(2)[1:]))


def test_half_precision_adds_up_to_its_rounding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = run(residual_mlp().bfloat16(), torch.randn(2, 4).bfloat16())
    assert paths.sum_error < 0.05


def test_autocast_adds_up_to_its_rounding():
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error", UserWarning)
        paths = run(residual_mlp(), torch.randn(2, 4))
    assert paths.gradient.dtype == torch.float32
    assert paths.sum_error < 0.05


def test_branches_that_are_zero_have_paths_that_carry_nothing():
    model = switch_mlp(4)
    for block in model[1:-1]:
        nn.init.zeros_(block.branch[2].weight)
    for chunk in (1, 2, 9):
        paths = run(model, chunk=chunk)
        assert paths.norms[1:].tolist() == [0, 0, 0, 0]
        assert paths.shares.tolist() == pytest.approx([1, 0, 0, 0, 0])
    assert run(model, max_length=2, method="energy", draws=2).energy[1:].tolist() == [0, 0]
    assert run(model, method="moments").mean_length == 0


def test_a_zero_gradient_has_no_shares():
    paths = run(loss=lambda y: 0 * y.sum())
    assert paths.sum_error == 0
    assert paths.norms.tolist() == [0] * 5
    assert paths.shares.isnan().all()


def test_relu_and_convolution_in_place_go_in_any_chunk():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *[InPlaceBlock(8) for _ in range(3)]).double()
    x = torch.randn(2, 3, 6, 6).double()
    rows = [run(model, x, chunk=chunk).norms for chunk in (1, 2, 4)]
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2])


def test_blocks_shared_by_several_sites_count_each_time():
    block = Block(4)
    paths = run(nn.Sequential(block, block, block).double(), torch.randn(2, 4).double())
    assert paths.sites == ("0[0]", "0[1]", "0[2]")
    assert paths.sum_error < 1e-12


def test_a_progress_bar_counts_the_lengths(capsys):
    pytest.importorskip("tqdm")
    run(progress="lengths")
    assert "lengths: 100%" in capsys.readouterr().err
    run(method="sampled", draws=3, progress="single")
    assert "15/15" in capsys.readouterr().err
    run()
    assert capsys.readouterr().err == ""


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_sites_under_activation_checkpointing_count_once(chunk):
    model = switch_mlp(4)
    inner = Checkpointed(model[1:3]), Checkpointed(model[3]), *model[4:]
    paths = run(nn.Sequential(model[0], *inner), chunk=chunk)
    torch.testing.assert_close(paths.norms, run(model).norms, rtol=1e-13, atol=0)


def test_a_model_whose_sites_have_no_gradient_has_one_path():
    class Frozen(Detached):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                frozen = self.inner(x)
            return self.head(x) + frozen

    paths = run(Frozen())
    assert (paths.paths, paths.sites) == ((1,), ())
    assert paths.shares.tolist() == pytest.approx([1])


def test_a_compiled_branch_is_a_branch():
    model = switch_mlp(3)
    whole = run(model)
    model[2].branch.compile(backend="aot_eager")
    assert torch.allclose(run(model, chunk=1).norms, whole.norms)
    with pytest.warns(UserWarning, match="lengths are computed one at a time, not 4"):
        assert torch.allclose(run(model, chunk=4).norms, whole.norms)


@pytest.mark.parametrize("method", ["exact", "moments", "energy", "sampled"])
def test_the_default_device_does_not_matter(method):
    model, x = switch_mlp(4), torch.randn(2, 3).double()
    paths = run(model, x, torch.sum, method=method, draws=2)
    with torch.device("meta"):
        assert repr(run(model, x, torch.sum, method=method, draws=2)) == repr(paths)
        assert run(model, x, torch.sum, by="block").weight_norms.device.type == "cpu"


def test_nothing_of_the_graph_stays_in_memory():
    model, x = switch_mlp(4), torch.randn(2, 3).double()

    def measure() -> None:
        for method in ("exact", "moments", "energy", "sampled"):
            for chunk in (1, 3):
                run(model, x, method=method, chunk=chunk, draws=2)
        run(model, x, by="block")
        with pytest.raises(ValueError, match="max_length"):
            run(model, x, max_length=9)

    def alive() -> int:
        return sum(type(each) is Tensor for each in gc.get_objects())

    measure()
    gc.collect()
    before = alive()
    gc.disable()
    try:
        measure()
        assert alive() == before
    finally:
        gc.enable()
