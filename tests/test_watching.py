"""A model that is watched may fail, change, be copied and be called in unusual ways."""

from __future__ import annotations

import copy
from pickle import dumps, loads

import pytest
import torch
from models import Block, residual_mlp
from record_models import vectors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastres.ops import native
from fastres.record import record


class Fickle(nn.Module):
    """A model whose graph is another one after the first pass."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.first, self.second, self.spare = Block(8), Block(8), Block(8)
        self.change, self.passes = change, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        changed = self.passes > 1
        x = self.first(x)
        if changed and self.change == "shape":
            x = x[:, None]
        if not (changed and self.change == "skipped"):
            x = self.second(x)
        if changed and self.change == "spare":
            x = self.spare(x)
        y = self.first.branch(x)
        if changed and self.change == "more":
            y = y + y.cos()
        if changed and self.change == "sides":
            y = y[:, :3]
        return x + y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"site 'second' expected \[\*, 8\], got \[2, 1, 8\]"),
        ("skipped", r"site 'second' expected \[\*, 8\], got none"),
        ("spare", r"module 'spare' did not run then"),
        ("more", r"site 'Fickle' expected \[\*, 8\], got"),
        ("sides", r"the add in 'Fickle' must have two sides that broadcast to one shape"),
    ],
)
def test_a_model_whose_graph_changes_is_told_where(change, message):
    model = Fickle(change)
    with record(model) as tape:
        model(torch.randn(2, 8))
        with pytest.raises((RuntimeError, ValueError), match=message):
            model(torch.randn(2, 8))
        assert torch._C._len_torch_function_stack() == 0
    assert tape.samples == 2  # the failed pass does not count


def test_an_exception_in_the_model_leaves_it_clean_and_the_pass_uncounted():
    model = residual_mlp(8, 3)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with record(model) as tape:
        for _ in range(2):  # in the first pass and in a later one
            handle = model[2].branch[2].register_forward_hook(fail)
            with pytest.raises(KeyError, match="mine"):
                model(vectors())
            assert torch._C._len_torch_function_stack() == 0
            handle.remove()
            model(vectors())
    assert tape.samples == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Looped(nn.Module):
    """Calls its block, or the layer in its own branch, as often as it is told."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.block = own, Block(4)

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = x + self.block.branch(x) if self.own else self.block(x)
        return x


@pytest.mark.parametrize("own", [True, False])
def test_a_block_that_runs_once_more_in_a_later_pass_is_seen(own):
    model = Looped(own)
    with record(model) as tape:
        model(vectors(), 2)
        with pytest.raises(RuntimeError, match=r"got one call more of 'block\.branch"):
            model(vectors(), 3)
        with pytest.raises(RuntimeError, match="got none"):
            model(vectors(), 1)
        model(vectors(), 2)
    assert tape.samples == 4


@pytest.mark.parametrize("part", [False, True])
def test_two_records_may_begin_at_one_call(part):
    model = residual_mlp(8, 3)
    inner = model[1] if part else model
    with record(model) as one, record(inner) as other:
        for seed in range(3):
            model(vectors(seed=seed))
    assert torch.equal(one.absolute[: len(other.names)], other.absolute)
    assert one.samples == other.samples == 6


def test_a_failure_before_the_first_pass_leaves_no_mode(monkeypatch):
    from fastres.versions import Graph

    model = residual_mlp()
    monkeypatch.setattr(Graph, "version", None)
    with record(model), pytest.raises(TypeError):
        model(vectors())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: loads(dumps(m))])
@pytest.mark.parametrize("passes", [0, 1])
def test_a_copy_made_while_recording_is_a_model_of_its_own(copied, passes):
    model = residual_mlp(8, 2)
    with record(model) as tape:
        for _ in range(passes):
            model(vectors())
        other = copied(model)
        other(vectors())
        model(vectors())
    assert torch.equal(other(vectors()), model(vectors()))
    assert tape.samples == 2 * passes + 2
    with record(other) as again:
        other(vectors())
    assert again.names == tape.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_one_record_computes_is_hidden_from_another(dtype):
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sin()
            return x + self.one(x).to(dtype) + self.two(x)

    model = Three()
    with record(model) as below, record(model) as above:
        model(vectors())
    assert below.names == above.names == ["Three[0]", "Three[1]"]


def test_a_hook_that_raises_in_front_of_a_module_costs_no_site():
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(4), Block(4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except KeyError:
                x = x.sin()
            return x + self.second.branch(x)

    def refuse(*_: object) -> None:
        raise KeyError

    model = Catching()
    model.second.branch.register_forward_hook(  # prepended once the search's own hooks are there
        lambda *_: model.first.register_forward_pre_hook(refuse, prepend=True) and None
    )
    outer = nn.Sequential(model, model)
    with record(outer) as tape:
        outer(vectors())
    assert tape.names == ["0.first", "0[0]", "0[1]"]


def test_a_model_that_returns_none_is_recorded_wherever_it_is_called():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(4)

        def forward(self, x: Tensor) -> None:
            self.block(x)

    model = Silent()
    with record(model) as tape:
        model(vectors())
        try:
            raise KeyError
        except KeyError:
            model(vectors())
    assert tape.samples == 4


def test_nested_and_sparse_inputs_are_no_obstacle():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(4)

        def forward(self, x: Tensor, mix: Tensor) -> Tensor:
            rows = x.to_padded_tensor(0.0).flatten(0, 1)
            return self.block(torch.sparse.mm(mix, rows))

    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    model = Both()
    with record(model) as tape:
        for _ in range(2):
            model(nested, torch.eye(6).to_sparse())
    assert tape.samples == 12


def test_a_users_mode_sees_every_add_of_a_recorded_model():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            adds.append(func in (Tensor.add, Tensor.__add__, torch.add))
            return func(*args, **(kwargs or {}))

    model = residual_mlp(512, 3)
    with torch.no_grad(), Seen():
        adds: list[bool] = []
        model(vectors(128))
        plain = sum(adds)
        with record(model):
            model(vectors(128))
            for _ in range(2):
                adds.clear()
                model(vectors(128))
                assert sum(adds) == plain == 3


def test_a_device_without_kernels_is_measured_in_plain_pytorch(monkeypatch):
    from fastres import measuring

    monkeypatch.setattr(native, "runs_on", lambda _: False)
    monkeypatch.setattr(measuring, "_sum", "not to be called")
    model = residual_mlp(8, 2)
    with torch.no_grad(), record(model) as tape:
        model(vectors())
    assert tape.absolute.isfinite().all()
