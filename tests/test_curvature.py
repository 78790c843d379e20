"""Claims about curvature on the way: blocks by their coordinates, and what a tracker sees."""

import pytest
import torch
from conditioning_models import Block, Net, X, Y, cross_entropy
from torch import nn

from fastres.analysis.conditioning import (
    CurvatureTracker,
    FunctionHessian,
    StackHessian,
    blocks_of,
    eigenvalues,
    model_hessian,
)
from fastres.nn import ResidualMLP, ShortcutNetwork


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def test_the_blocks_of_a_model_are_its_modules_with_adds(net):
    blocks = blocks_of(net, X)
    assert list(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    own = torch.cat([p.detach().flatten() for p in net.blocks[1].parameters()])
    torch.testing.assert_close(flat[blocks["blocks.1"]], own)


def test_the_blocks_of_a_stack_are_slices_of_its_parameters():
    model = ResidualMLP(4, 3, 5, blocks=3)
    blocks = blocks_of(model, X.float())
    assert list(blocks) == ["stack[0]", "stack[1]", "stack[2]"]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    own = torch.cat([p[1].detach().flatten() for p in model.stack.parameters()])
    assert torch.equal(flat[blocks["stack[1]"]], own)
    every = torch.cat(list(blocks.values()))
    assert len(every) == len(every.unique()) == sum(p.numel() for p in model.stack.parameters())


def test_the_units_of_a_shortcut_network_are_its_blocks():
    blocks = blocks_of(ShortcutNetwork(4, 3, 2), X.float())
    assert [chosen.tolist() for chosen in blocks.values()] == [
        list(range(first, first + 32)) for first in (0, 32, 64)
    ]


def test_a_model_whose_own_forward_has_the_adds_is_one_block():
    class Two(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    (chosen,) = blocks_of(Two(4), X.float()).values()
    assert len(chosen) == sum(p.numel() for p in Block(4).parameters())


def whole_hessian(net: Net) -> torch.Tensor:
    names, parameters = zip(*net.named_parameters(), strict=True)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        return cross_entropy(torch.func.functional_call(net, given, X))

    return FunctionHessian(loss, *parameters).dense()


def test_a_tracker_measures_each_block_as_it_is_then(net):
    pytest.importorskip("curvlinops")
    operator, blocks = model_hessian(net, nn.CrossEntropyLoss(), [(X, Y)]), blocks_of(net, X)
    tracker = CurvatureTracker(operator, blocks, steps=60, draws=20)
    for step in (0, 10):
        whole = whole_hessian(net)
        rows = tracker.look(step)
        assert [row.block for row in rows] == ["whole model", *blocks]
        for row, chosen in zip(rows, [torch.arange(len(whole)), *blocks.values()], strict=True):
            values = eigenvalues(whole[chosen][:, chosen])
            assert row.step == step
            assert row.parameters == len(chosen)
            assert row.largest == pytest.approx(float(values.values[-1]), rel=1e-6)
            assert row.smallest == pytest.approx(float(values.values[0]), rel=1e-6)
            assert abs(row.trace - float(values.values.sum())) < 5 * row.trace_error
        with torch.no_grad():  # the next look must see this
            for parameter in net.parameters():
                parameter.mul_(1.5)
    assert len(tracker.rows) == 8
    assert tracker.rows[0].largest != tracker.rows[4].largest


def test_rows_become_a_frame(net):
    pytest.importorskip("pandas")
    shapes = ((2, 3), (1, 3, 3), (1, 3), (1, 3, 3), (1, 3))
    given = (torch.randn(*shape) for shape in shapes)
    operator = StackHessian(*given, lambda y: y.square().sum())
    tracker = CurvatureTracker(operator, steps=3)
    tracker.look(7)
    frame = tracker.to_frame()
    assert frame[["step", "block", "parameters"]].values.tolist() == [[7, "whole model", 24]]


def test_a_block_may_be_called_model_and_none_as_all_parameters_together():
    operator = FunctionHessian(lambda x: x.square().sum(), torch.ones(3))
    chosen = torch.tensor([0, 2])
    rows = CurvatureTracker(operator, {"model": chosen}).look(0)
    assert [(row.block, row.parameters) for row in rows] == [("whole model", 3), ("model", 2)]
    with pytest.raises(ValueError, match="blocks must not have the name 'whole model'"):
        CurvatureTracker(operator, {"whole model": chosen})


def test_blocks_that_are_not_trained_are_left_out(net):
    net.blocks[1].requires_grad_(False)
    assert list(blocks_of(net, X)) == ["blocks.0", "blocks.2"]


def test_coordinates_beyond_the_operator_are_refused():
    operator = FunctionHessian(lambda x: x.square().sum(), torch.ones(3))
    for wrong in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"blocks\['a'\] must be coordinates 0 to 2"):
            CurvatureTracker(operator, {"a": wrong})


def test_a_model_without_trained_parameters_has_no_hessian():
    pytest.importorskip("curvlinops")
    with pytest.raises(ValueError, match="model must have trained parameters, got none"):
        model_hessian(nn.ReLU(), nn.MSELoss(), [])


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("model", "loss", "error", "message"),
    [
        (nn.Linear(4, 3), nn.L1Loss(), TypeError, "loss must be one of MSELoss, .* got L1Loss"),
        (nn.Linear(4, 3), cross_entropy, TypeError, "loss must be one of MSELoss, .* got function"),
        (
            nn.Sequential(nn.BatchNorm1d(4)),
            nn.MSELoss(),
            ValueError,
            "in eval mode, got 0 in train",
        ),
        (tied(), nn.MSELoss(), ValueError, "model must not share parameters"),
    ],
    ids=["another loss", "a function", "batch norm in training", "shared parameters"],
)
def test_what_curvlinops_cannot_differentiate_is_named(model, loss, error, message):
    pytest.importorskip("curvlinops")
    state = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(error, match=message):
        model_hessian(model, loss, [(X, Y)])
    assert all(map(torch.equal, state, model.state_dict().values()))


def test_a_tracker_needs_steps_and_draws():
    operator = FunctionHessian(lambda x: x.square().sum(), torch.ones(3))
    for name in ("steps", "draws"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            CurvatureTracker(operator, **{name: 0})


def test_a_mean_over_no_data_has_no_hessian(net):
    pytest.importorskip("curvlinops")
    with pytest.raises(ValueError, match="data must have at least one batch, got none"):
        model_hessian(net, nn.MSELoss(), [])
