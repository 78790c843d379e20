"""Lesions are what deleting and moving blocks by hand gives, in less time."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Block, InPlaceBlock, UNet, cifar_resnet, residual_mlp, stacks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.analysis.lesion import delete, pairs, random_sets
from fastres.analysis.lesions import Lesions, kendall_tau
from fastres.analysis.recalibrating import recalibrated
from fastres.analysis.reordering import random_orders, reorder
from fastres.data import read
from fastres.gates import gate
from fastres.sites import trace
from fastres.studies.paths_network import FILES, trained

ROOT = os.environ.get("FASTRES_DATA")
needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")


def first(out: Tensor, y: Tensor) -> Tensor:
    """A score that sees every change."""
    return out.flatten(1).double().mul(torch.arange(1, out[0].numel() + 1)).sum(1).float() + y


def images(batch: int = 5, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One block that runs twice, adds in the model's own forward, and one module that runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 8), Block(8), Block(8)
        self.f, self.g, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)))
        x = x + self.f(x)
        x = self.one(x)
        x += self.g(x)
        return self.head(self.two.branch(x))


class Early(nn.Module):
    """A block whose add stands before its modules, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(8, 8) / 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x += (x @ self.weight).tanh()
        return self.last(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (residual_mlp, torch.randn(5, 4)),
    "cifar": (cifar_resnet, images()),
    "in place": (lambda: nn.Sequential(*[InPlaceBlock(3) for _ in range(3)]), images()),
    "u-net": (lambda: UNet(additive=False), images()),
    "long add": (lambda: UNet(additive=True), images()),
    "shared": (Shared, torch.randn(5, 4)),
    "early": (
        lambda: nn.Sequential(nn.Linear(4, 8), *[Early() for _ in range(3)]),
        torch.randn(5, 4),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Linear(4, 8), Block(8, residual_mlp(8, 2)[1:]), Block(8)),
        torch.randn(5, 4),
    ),
    "stack": (lambda: stacks(4)[0], torch.randn(5, 4)),
}


def built(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make().eval()
    return model, x, [site.name for site in trace(model, x)]


def separately(model: nn.Module, x: Tensor, sets: list[tuple[str, ...]]) -> Tensor:
    values = []
    for names in sets:
        with torch.no_grad(), gate(model, dict.fromkeys(names, 0.0)):
            values.append(first(model(x), torch.zeros(len(x))))
    return torch.stack(values)


@pytest.mark.parametrize("name", MODELS)
def test_shared_prefixes_give_what_separate_evaluations_give_bit_for_bit(name):
    model, x, names = built(name)
    sets = [each for k in (1, 2) for each in itertools.combinations(names, k)]
    state = copy.deepcopy(model.state_dict())
    found = delete(model, x.clone(), torch.zeros(len(x)), sets, score=first, batch_size=3)
    for part in (slice(0, 3), slice(3, 5)):
        assert torch.equal(found.values[:, part], separately(model, x[part].clone(), sets)[:, :])
        assert torch.equal(found.baseline[part], separately(model, x[part].clone(), [()])[0])
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["mlp", "cifar", "stack"])
def test_copies_give_the_same(name):
    model, x, names = built(name)
    y = torch.zeros(len(x))
    one = delete(model, x, y, pairs(names), score=first)
    many = delete(model, x, y, pairs(names), score=first, copies=4, batch_size=2)
    torch.testing.assert_close(many.values, one.values, rtol=1e-4, atol=1e-4)


def test_sets_may_have_gates_of_their_own():
    model, x, _ = built("mlp")
    found = delete(model, x, torch.zeros(5), [{"1": 0.5, "3": 2.0}], score=first)
    with torch.no_grad(), gate(model, {"1": 0.5, "3": 2.0}):
        assert torch.equal(found.values[0], first(model(x), torch.zeros(5)))


def test_modules_before_the_lesion_do_not_run_again():
    model, x, names = built("mlp")
    runs: list[str] = []
    for name in names:
        inner = model.get_submodule(name).branch[0]
        inner.register_forward_pre_hook(lambda *_, name=name: runs.append(name) and None)
    delete(model, x, torch.zeros(5), [("1",), ("2",), ("3",)], score=first)
    whole = ["1", "2", "3"]  # trace, the first pass, without a lesion
    assert runs == [*whole, *whole, *whole, "3", "2", "3"]  # of "1" and "2" the blocks after them


def test_intervals_are_of_the_paired_difference():
    baseline = torch.tensor([0.0, 1.0, 0.0, 0.0])
    values = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    found = Lesions(("a", "b"), (("a",), ("b",)), baseline, values)
    assert found.error.tolist() == [0.5, 0.25]
    assert found.change.tolist() == [0.25, 0.0]
    assert found.change_error.tolist() == [0.25, 0.0]
    low, high = found.interval()[0]
    assert (low.item(), high.item()) == pytest.approx(
        (0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25), abs=1e-4
    )
    with pytest.raises(RuntimeError, match="must have two sites together and alone"):
        found.interactions.sum()


def test_interactions_are_what_two_deletions_do_beyond_each_alone():
    model, x, names = built("mlp")
    found = delete(model, x, torch.zeros(5), pairs(names), score=first)
    means = dict(zip(found.sets, found.error.tolist(), strict=True))
    base = found.baseline.double().mean().item()
    want = means["1", "3"] - means[("1",)] - means[("3",)] + base
    assert found.interactions[0, 2].item() == pytest.approx(want, rel=1e-6)
    assert torch.equal(found.interactions, found.interactions.T) or found.interactions.isnan().any()
    assert found.interactions.diagonal().isnan().all()


def test_random_sets_are_of_their_size_and_every_site_as_often():
    names = [str(i) for i in range(10)]
    found = random_sets(names, [0, 3, 10], draws=400, seed=2)
    assert [len(each) for each in found] == [0] * 400 + [3] * 400 + [10] * 400
    count = torch.tensor([sum(name in each for each in found[400:800]) for name in names])
    assert (count - 120).abs().max() < 5 * (400 * 0.3 * 0.7) ** 0.5
    assert found == random_sets(names, [0, 3, 10], draws=400, seed=2)
    assert all(len(set(each)) == len(each) for each in found)


def test_new_statistics_undo_a_mere_change_of_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Block(8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(200, 4)
    with recalibrated(model.eval(), x):
        want = model(x)
    before = copy.deepcopy(model.state_dict())
    model[0].weight.data *= 3
    model[0].bias.data *= 3
    model[1] = nn.Identity()
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    for mine, theirs in zip(plain, (model[0], model[2], model[3]), strict=True):
        mine.load_state_dict(theirs.state_dict())
    with recalibrated(plain, x):
        scaled = plain(x)
    plain[0].weight.data /= 3
    plain[0].bias.data /= 3
    with recalibrated(plain, x):
        torch.testing.assert_close(plain(x), scaled, rtol=1e-4, atol=1e-4)
    assert not torch.equal(scaled, want)
    assert all(torch.equal(before[k], v) for k, v in model[2].state_dict(prefix="2.").items())


def test_a_recalibrated_lesion_is_normalised_by_its_own_statistics():
    model, x, names = built("cifar")
    y = torch.zeros(len(x))
    state = copy.deepcopy(model.state_dict())
    found = delete(model, x, y, [(names[0],)], score=first, recalibrate=images(9))
    with torch.no_grad(), gate(model, {names[0]: 0.0}), recalibrated(model, images(9)):
        assert torch.equal(found.values[0], first(model(x), y))
    plain = delete(model, x, y, [(names[0],)], score=first)
    assert not torch.equal(found.values, plain.values)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)].count(0.1) > 3


def test_a_reordered_model_is_the_model_with_its_modules_moved():
    model, x, _ = built("mlp")
    orders = [list(order) for order in itertools.permutations(range(3))]
    found = reorder(model, x, torch.zeros(5), orders, score=first, batch_size=3)
    for order, values in zip(orders, found.values, strict=True):
        moved = nn.Sequential(model[0], *[model[1 + block] for block in order])
        want = torch.cat([first(moved(x[:3]), torch.zeros(3)), first(moved(x[3:]), torch.zeros(2))])
        assert torch.equal(values, want)
    assert torch.equal(found.values[0], found.baseline)
    assert found.tau.tolist() == pytest.approx([1, 1 / 3, 1 / 3, -1 / 3, -1 / 3, -1])
    assert not any("forward" in vars(module) for module in model.modules())


def test_random_orders_swap_blocks_of_one_shape_alone():
    torch.manual_seed(0)
    model = nn.Sequential(*cifar_resnet()[:3], InPlaceBlock(8), *cifar_resnet()[3:])
    sites = trace(model.eval(), images())
    orders = random_orders(sites, [1, 5], draws=20)
    moved = {place for order in orders for place, block in enumerate(order) if place != block}
    assert {sites[place].kind for place in moved} == {"identity"}
    for order in orders:
        assert all(sites[p].shape == sites[b].shape for p, b in enumerate(order))
    assert all(sum(p != b for p, b in enumerate(order)) == 2 for order in orders[:20])
    reorder(model, images(), torch.zeros(5), orders, score=first)


def test_kendall_tau_counts_inversions():
    assert kendall_tau(range(27)) == 1
    assert kendall_tau([1, 0, 2, 3]) == pytest.approx(1 - 4 / 12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    signs = [(1 if order[i] < order[j] else -1) for i, j in itertools.combinations(range(30), 2)]
    assert kendall_tau(order) == pytest.approx(sum(signs) / len(signs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: delete(m, x, y, [("9",)]), "sets must name sites of the model, .*got '9'"),
        (lambda m, x, y: delete(m, x, y, ["1"]), "sets of site names, got the name '1'"),
        (lambda m, x, y: delete(m, x, y, [("1", "1")]), r"each site once, got \('1', '1'\)"),
        (lambda m, x, y: delete(m, x[:0], y[:0]), "as many, at least 1, got 0, 0"),
        (lambda m, x, y: delete(m, x, y[:2]), "as many, at least 1, got 5, 2"),
        (lambda m, x, y: delete(m, x, y, copies=0), "copies must be >= 1, got 0"),
        (lambda m, x, y: delete(m, x, y, batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda m, x, y: delete(m, x, y, recalibrate=x), "model must contain batch norm"),
        (lambda m, x, y: delete(m, x, y, recalibrate=x[:1]), "2 inputs or more"),
        (lambda m, x, y: delete(m[0], x, y), "delete: model must contain a residual add"),
        (lambda m, x, y: random_sets(["a"], [2], 1), "sizes must be 0 to 1, the sites, got 2"),
        (lambda m, x, y: random_sets(["a"], [1], 0), "draws must be >= 1, got 0"),
        (lambda m, x, y: reorder(m, x, y, [[0, 1]]), "orders must have 0 to 2, the sites"),
        (lambda m, x, y: kendall_tau([0, 0]), "order must have 0 to 1 once"),
        (lambda m, x, y: random_orders([], [1], 1), "two identity skips of one shape"),
    ],
)
def test_wrong_arguments_are_told(call, message):
    model, x, _ = built("mlp")
    with pytest.raises(ValueError, match=message):
        call(model, x, torch.zeros(5))


def test_blocks_that_cannot_be_moved_are_told():
    model, x, _ = built("cifar")
    y = torch.zeros(len(x))
    with pytest.raises(ValueError, match="leave projections where they are, got '2'"):
        reorder(model, x, y, [[1, 0, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"blocks of one shape, got '3' \[8, 4, 4\] in the place"):
        reorder(model, x, y, [[2, 1, 0, 3, 4]])
    model, x, names = built("nested")
    assert names == ["1.branch.1", "1.branch.2", "1", "2"]
    for order in ([1, 0, 2, 3], [0, 1, 3, 2]):  # within a branch, and a block that has blocks
        with pytest.raises(ValueError, match=r"blocks that are modules of their own, got '1"):
            reorder(model, x, torch.zeros(5), [order])
    model, x, _ = built("stack")
    with pytest.raises(ValueError, match=r"modules of their own, got 'stack\[0\]'"):
        reorder(model, x, torch.zeros(5), [[1, 0, 2, 3]])


@needs_files
def test_all_single_lesions_of_resnet_56_take_at_most_0_6_of_the_operations_of_separate_ones():
    network = trained(56, Path(ROOT) / "pretrained" / FILES[56])
    x, y = images(32, 32), torch.zeros(32).long()
    with torch.no_grad():
        names = [site.name for site in trace(network, x[:1])]
        with FlopCounterMode(display=False) as shared:
            found = delete(network, x, y)  # and once without a lesion
        values = []
        with (
            FlopCounterMode(display=False) as separate,
            gate(network, lambda step: {names[step]: 0.0}),
        ):
            for _ in names:
                values.append((network(x).argmax(1) != y).float())
    assert torch.equal(found.values, torch.stack(values))
    assert shared.get_total_flops() <= 0.6 * separate.get_total_flops()


@needs_files
def test_one_deletion_outside_the_transitions_costs_resnet_56_little():
    network = trained(56, Path(ROOT) / "pretrained" / FILES[56])
    _, (pixels, labels) = read("cifar10", ROOT)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    scale = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = (torch.from_numpy(pixels[:200]).float() / 255 - mean) / scale
    y = torch.from_numpy(labels[:200]).long()
    found = delete(network, x, y, [("layer1.4",), ("layer3.5",)])
    assert found.change.max() < 0.05
