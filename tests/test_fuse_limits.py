"""What fuse leaves alone, and why; and what happens when a fused model is changed."""

from __future__ import annotations

import pytest
import torch
from fuse_models import Akamaster, Handwritten, Kuangliu, images, twins
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastres


class Own(nn.BatchNorm2d):
    """A subclass that overrides forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Counting(Akamaster):
    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


class Dropping(Akamaster):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.dropout(x, 0.1, self.training))) + self.shortcut(x))


class Branching(Akamaster):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Optional(Akamaster):
    def forward(self, x, mask=None, scale=1.0):
        return scale * super().forward(x if mask is None else x * mask)


class ByName(Akamaster):
    def forward(self, x, *, mask=None):
        return super().forward(x)


class IntoSkip(Akamaster):
    def forward(self, x):
        x = self.shortcut(x.clone())
        x += self.bn2(self.conv2(F.relu(x)))
        return F.relu(x)


class Scaled(Akamaster):
    def forward(self, x):
        return F.relu(torch.add(self.shortcut(x), self.bn2(self.conv2(x.tanh())), alpha=2))


class InPlace(Akamaster):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn1(self.conv1(x))))
        out += self.shortcut(x)
        return out


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Counting, "its forward sets passes"),
        (Dropping, "its forward depends on its mode, training or eval"),
        (Branching, "its forward cannot be followed: "),
        (ByName, "its forward has an argument by name or position alone, mask"),
        (IntoSkip, "it adds into its skip in place"),
        (Scaled, "its add scales one side"),
        (InPlace, "it adds in place, and there is nothing beside that"),
    ],
)
def test_a_block_that_cannot_be_written_anew_is_left_and_reported(kind, why):
    model = nn.Sequential(kind(3, 3), nn.Conv2d(3, 4, 1), Akamaster(4, 4))
    state = dict(vars(model[0]))
    fusion = fastres.fuse(model, images())
    assert fusion.left.keys() == {"0"}
    assert fusion.left["0"].startswith(why)
    assert fusion.fused == {"2": "batch norm + add + ReLU"}
    assert type(model[0]) is kind
    if kind is Counting:  # verified twice more, and traced
        model[0].passes = 0
    assert vars(model[0]).keys() == state.keys()


def test_batch_norms_of_another_class_or_with_hooks_or_a_forward_are_left():
    model = nn.Sequential(*(Akamaster(3, 3) for _ in range(4)))
    model[0].bn2 = Own(3)
    model[1].bn2.register_forward_hook(lambda *_: None)
    model[2].forward = model[2].forward
    fusion = fastres.fuse(model.eval(), images())
    assert fusion.left == {
        "0": "its batch norm bn2 is a Own",
        "1": "its batch norm bn2 has hooks",
        "2": "it has a forward of its own",
    }
    assert fusion.fused.keys() == {"3"}


def test_a_subclass_is_fused_by_its_own_forward():
    class Doubled(Akamaster):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 3))
    y = model(images())
    assert fastres.fuse(model, images()).fused == {"0": "batch norm + add + ReLU"}
    torch.testing.assert_close(model(images()), y)


def test_a_forward_with_options_is_fused_where_they_are_not_given():
    model = nn.Sequential(Optional(3, 3))
    x, mask = images(), images(seed=9)
    outs = [model(x), model[0](x, mask), model[0](x, scale=2.0), model[0](x=x, mask=mask)]
    assert fastres.fuse(model, x).fused == {"0": "batch norm + add + ReLU"}
    again = [model(x), model[0](x, mask), model[0](x, scale=2.0), model[0](x=x, mask=mask)]
    torch.testing.assert_close(again[0], outs[0])
    assert all(torch.equal(a, b) for a, b in zip(again[1:], outs[1:], strict=True))


def test_a_mismatch_undoes_everything_and_says_where():
    class Proxied(Akamaster):
        def forward(self, x):
            y = super().forward(x)
            return y if isinstance(x, torch.Tensor) else 2 * y

    model = nn.Sequential(Akamaster(3, 3), Proxied(3, 3))
    y = model(images())
    fusion = fastres.fuse(model, images())
    assert not fusion.fused
    assert not fusion.verified
    assert fusion.left.keys() == {"0", "1"}
    assert all("outputs were" in why for why in fusion.left.values())
    assert [type(block) for block in model] == [Akamaster, Proxied]
    assert torch.equal(model(images()), y)


@pytest.mark.parametrize("where", ["bn2", "relu"])
def test_a_hook_that_comes_later_is_called(where):
    plain, fused = twins(Handwritten)
    expected, seen = [], []
    for model, heard in ((plain, expected), (fused, seen)):
        target = model[1].act if where == "relu" else model[1].branch[3][1]
        target.register_forward_hook(lambda _m, _a, y, to=heard: to.append(y.clone()))
        model(images())
    assert len(seen) == 1
    torch.testing.assert_close(seen, expected)


def test_hooks_on_every_module_are_called():
    plain, fused = twins(Kuangliu)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, _a, _y: seen.append(type(m)))
    try:
        plain(images())
        expected, seen[:] = list(seen), []
        fused(images())
    finally:
        handle.remove()
    assert [kind for kind in seen if not issubclass(kind, Kuangliu)] == [
        kind for kind in expected if kind is not Kuangliu
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.bn2, "momentum", None),
        lambda block: setattr(block.bn2, "momentum", 0.7),
        lambda block: setattr(block.bn2, "eps", 0.5),
        lambda block: setattr(block.bn2, "track_running_stats", False),
        lambda block: block.bn2.eval(),
        lambda block: setattr(block, "bn2", nn.BatchNorm2d(16, affine=False)),
        lambda block: setattr(block, "bn2", nn.BatchNorm2d(16, track_running_stats=False)),
        lambda block: setattr(block, "bn2", nn.Identity()),
        lambda block: block._modules.update(bn2=nn.GroupNorm(2, 16)),
        lambda block: setattr(block, "shortcut", nn.Conv2d(8, 16, 3, 2, 1)),
        lambda block: nn.utils.parametrize.register_parametrization(
            block.bn2, "weight", nn.Softplus()
        ),
    ],
)
def test_what_is_changed_after_fuse_changes_the_fused_model_too(change):
    plain, fused = twins(Kuangliu)
    for model in (plain, fused):
        torch.manual_seed(5)
        change(model[2])
    for train in (True, True, False):
        for model in (plain, fused):
            model.train(train)
        torch.testing.assert_close(fused(images()), plain(images()), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def test_setting_what_a_forward_has_read_gives_the_block_its_own_forward():
    class Alpha(Akamaster):
        alpha = 1.0

        def forward(self, x):
            return F.relu(self.alpha * self.shortcut(x) + self.bn2(self.conv2(x.tanh())))

    model = nn.Sequential(Alpha(3, 3), Alpha(3, 3))
    fastres.fuse(model, images())
    before = model(images())
    model[0].note = "nothing that is read"
    assert type(model[0]) is not Alpha
    model[0].alpha = 3.0
    assert type(model[0]) is Alpha
    assert type(model[1]) is not Alpha
    assert not model(images()).allclose(before)


def test_a_lesion_of_a_fused_model_is_that_of_the_model():
    from fastres.analysis.lesion import delete

    plain, fused = (model.eval() for model in twins(Kuangliu))
    found, expected = (delete(m, images(), torch.arange(4)) for m in (fused, plain))
    assert found.change.tolist() == expected.change.tolist()


def test_one_module_called_twice_is_fused_once():
    block = Akamaster(3, 3)
    model = nn.Sequential(block, block)
    y = model.eval()(images())
    assert fastres.fuse(model, images()).fused.keys() == {"0"}
    torch.testing.assert_close(model(images()), y)


def test_shapes_that_broadcast_and_wrong_inputs_go_the_way_of_the_model():
    plain, fused = twins(Kuangliu)
    for model in (plain, fused):
        model.eval()[1].shortcut = nn.AdaptiveAvgPool2d(1)
    torch.testing.assert_close(fused(images()), plain(images()))
    for model in (plain, fused):
        with pytest.raises(ValueError, match="expected 4D input"):
            model[3].bn2.train(), model[3](torch.randn(16, 8, 8))


def test_a_model_without_blocks_is_left():
    assert (
        repr(fastres.fuse(nn.Linear(2, 2), torch.ones(3, 2))) == "Fusion of Linear: 0 of 0 blocks"
    )


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model must be a torch.nn.Module, got int"),
        (torch.jit.script(nn.Linear(2, 2)), TypeError, "model must not be scripted, got .*Script"),
        (nn.LazyLinear(2), ValueError, "model must be initialized, got lazy parameter 'weight'"),
        (
            nn.Sequential(torch.ao.nn.quantized.Linear(2, 2)),
            TypeError,
            "model must not be quantized, got Linear in '0'",
        ),
    ],
)
def test_what_cannot_be_fused_is_an_error(model, error, message):
    with pytest.raises(error, match=f"fuse: {message}"):
        fastres.fuse(model, torch.ones(3, 2))


def test_to_verify_an_example_is_needed():
    with pytest.raises(ValueError, match="fuse: example must be given to verify, got None"):
        fastres.fuse(nn.Linear(2, 2), verify=True)
    with pytest.raises(TypeError, match=r"restore: model must be a torch\.nn\.Module, got int"):
        fastres.restore(3)
