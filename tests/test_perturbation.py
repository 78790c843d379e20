"""Claims about perturbation and trajectory: known answers, and what the sums cannot tell."""

from __future__ import annotations

import math

import pytest
import torch
from models import cifar_resnet
from torch import Tensor, nn

import fastres
from fastres.analysis import power_law
from fastres.analysis.perturbation import magnitude, magnitudes, perturbation
from fastres.analysis.trajectory import displacement, stages
from fastres.sites import add


class Fixed(nn.Module):
    """A stream whose blocks each add `make(x)`; the weight makes the branch a branch."""

    def __init__(self, make, blocks: int) -> None:
        super().__init__()
        self.make, self.blocks = make, blocks
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for block in range(self.blocks):
            x = add(x, self.one * self.make(block, x))
        return x


def tape_of(model: nn.Module, x: Tensor) -> fastres.Tape:
    with torch.no_grad(), fastres.record(model, per_sample=True) as tape:
        model(x)
    return tape


def samples(batch: int = 7) -> Tensor:
    x = torch.randn(batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x * torch.arange(1, batch + 1)[:, None]  # samples of different lengths


@pytest.mark.parametrize("reduce", ["mean_of_ratios", "ratio_of_means", "rms"])
def test_a_branch_of_c_x_over_l_is_scaled_c_over_l_in_every_reading(reduce):
    depths, found = [6, 12, 48], []
    for blocks in depths:
        model = Fixed(lambda _, x, n=blocks: 0.7 * x / n, blocks)
        measured = perturbation(tape_of(model, samples()), reduce)
        assert measured.scaled.tolist() == pytest.approx([0.7 / blocks] * blocks, rel=1e-12)
        found.append(measured.mean_scaled)
    law = power_law(depths, found)
    assert (law.exponent, law.constant) == (pytest.approx(-1), pytest.approx(0.7))


def test_the_readings_differ_where_samples_do():
    def make(_, x):
        return torch.linspace(0.1, 1, len(x), dtype=x.dtype)[:, None] * x.flip(1)

    x = samples()
    tape = tape_of(Fixed(make, 1), x)
    lengths, ratios = x.norm(dim=1), torch.linspace(0.1, 1, len(x), dtype=x.dtype)
    assert perturbation(tape).scaled.item() == pytest.approx(ratios.mean().item())
    means = (ratios * lengths).mean() / lengths.mean()
    assert perturbation(tape, "ratio_of_means").scaled.item() == pytest.approx(means.item())
    root = ((ratios * lengths).square().sum() / lengths.square().sum()).sqrt()
    assert perturbation(tape, "rms").scaled.item() == pytest.approx(root.item())
    out = (x + make(0, x)).norm(dim=1)
    by_output = perturbation(tape, scale_by="output").scaled.item()
    assert by_output == pytest.approx((ratios * lengths / out).mean().item())
    per = perturbation(tape, per_feature=True)
    assert per.absolute.item() == pytest.approx(tape.absolute.item() / math.sqrt(5))


def test_the_default_is_what_the_tape_says():
    tape = tape_of(fastres.nn.ResidualMLP(5, 2, width=8, blocks=4), samples().float())
    measured = perturbation(tape)
    assert torch.allclose(measured.scaled, tape.scaled, rtol=1e-12)
    assert measured.mean_absolute == pytest.approx(tape.mean_absolute, rel=1e-12)
    assert math.isnan(measured.projection_scaled)


def test_projection_sites_are_averaged_apart():
    tape = tape_of(cifar_resnet().eval(), torch.randn(3, 3, 8, 8))
    measured = perturbation(tape)
    projection = torch.tensor([kind == "projection" for kind in measured.kinds])
    assert 0 < projection.sum() < len(projection)
    assert measured.mean_scaled == pytest.approx(measured.scaled[~projection].mean().item())
    assert measured.projection_scaled == pytest.approx(measured.scaled[projection].mean().item())


def test_parallel_and_orthogonal_part_are_those_of_the_vectors():
    def make(_, x):
        return -0.5 * x + torch.stack([x[:, 1], -x[:, 0]], 1)  # at a right angle to x

    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    measured = perturbation(tape_of(Fixed(make, 1), x))
    assert measured.parallel.item() == pytest.approx(-0.5 * 3)  # mean length of x is 3
    assert measured.orthogonal.item() == pytest.approx(3)
    assert measured.angle.item() == pytest.approx(math.pi - math.atan(2))


def test_48_batch_normed_blocks_at_he_start_give_about_2_over_root_l():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            layers = []
            for _ in range(2):
                layers += [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width, bias=False)]
                nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
            self.branch = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return add(x, self.branch(x))

    model = nn.Sequential(nn.Linear(64, 64), *(Block(64) for _ in range(48)))
    measured = perturbation(tape_of(model, torch.randn(512, 64)))
    assert measured.mean_scaled == pytest.approx(2 / math.sqrt(48), rel=0.2)


def test_the_three_sums_do_not_tell_the_displacement():
    start = torch.tensor([[1.0, 0.0, 0.0]])

    def straight(block, x):
        return torch.tensor([[0.0, 1.0, 0.0]]).expand_as(x)

    def bent(block, x):  # the second branch turned about x_1: the same length and the same angle
        return straight(0, x) if block == 0 else torch.tensor([[1.0, 0.0, 0.0]]).expand_as(x)

    one, two = (tape_of(Fixed(make, 2), start) for make in (straight, bent))
    for name in ("skip_sq", "branch_sq", "dot"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    states = [torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])]
    far = displacement(torch.stack([*states, torch.tensor([[1.0, 2, 0]])]))
    near = displacement(torch.stack([*states, torch.tensor([[2.0, 1, 0]])]))
    assert far.displacement.item() == 2
    assert near.displacement.item() == pytest.approx(math.sqrt(2))
    (stage,) = stages(one)
    assert stage.sites == range(2)
    assert stage.length.item() == far.length.item() == near.length.item() == 2
    assert stage.least.item() <= near.displacement.item() < far.displacement.item()
    assert far.straightness.item() == 1


def test_a_way_ends_where_the_skip_is_a_projection():
    tape = tape_of(cifar_resnet().eval(), torch.randn(3, 3, 8, 8))
    inside = [i for stage in stages(tape) for i in stage.sites]
    assert inside == [i for i, kind in enumerate(tape.kinds) if kind == "identity"]
    assert len(stages(tape)) > 1


def test_pixels_channels_and_other_norms_are_those_of_the_tensors():
    x = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])  # one sample, two channels, two pixels
    f = torch.tensor([[[6.0, 1.0], [8.0, 1.0]]])
    whole = magnitude(x, f, norm=1)
    assert (whole.absolute.item(), whole.scaled.item()) == (16, pytest.approx(16 / 7))
    assert magnitude(x, f, norm=math.inf).scaled.item() == 2
    pixel = magnitude(x, f, granularity="pixel")
    assert pixel.absolute.item() == pytest.approx((10 + math.sqrt(2)) / 2)
    assert (pixel.scaled.item(), pixel.counted.item()) == (2, 0.5)  # the second pixel of x is 0
    channel = magnitude(x, f, granularity="channel", scale_by="output")
    expected = (math.sqrt(37 / 82) + math.sqrt(65 / 145)) / 2
    assert channel.scaled.item() == pytest.approx(expected)


def test_magnitudes_of_samples_are_those_of_the_tape():
    torch.manual_seed(0)
    for model, x in (
        (cifar_resnet().eval(), torch.randn(3, 3, 8, 8)),
        (fastres.nn.ResidualMLP(5, 2, width=8, blocks=4), samples().float()),
    ):
        tape, found = tape_of(model, x), magnitudes(model, x)
        assert torch.allclose(found.scaled, tape.scaled, rtol=1e-5)
        assert torch.allclose(found.absolute, tape.absolute, rtol=1e-5)
        assert found.counted.tolist() == [1] * len(tape.names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce": "median"}, "perturbation: reduce must be one of mean_of_ratios, .* 'median'"),
        ({"scale_by": "width"}, "perturbation: scale_by must be one of input, output, got 'width'"),
    ],
)
def test_readings_that_are_not_known_are_refused(change, message):
    tape = tape_of(fastres.nn.ResidualMLP(5, 2, width=8, blocks=1), samples().float())
    with pytest.raises(ValueError, match=message):
        perturbation(tape, **change)


def test_bad_input_is_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="magnitude: x and f must have one shape of 3 or more"):
        magnitude(x, x, granularity="pixel")
    with pytest.raises(ValueError, match="magnitude: norm must be positive, got 0"):
        magnitude(x, x, norm=0)
    with pytest.raises(ValueError, match="magnitudes: model must contain a residual add"):
        magnitudes(nn.Linear(3, 3), x)
    with pytest.raises(ValueError, match=r"displacement: states must be .* got \[1, 2, 3\]"):
        displacement(torch.ones(1, 2, 3))
    with fastres.record(fastres.nn.ResidualMLP(3, 2, width=8, blocks=1)) as tape:
        pass
    with pytest.raises(RuntimeError, match="tape must see a forward pass"):
        perturbation(tape)
