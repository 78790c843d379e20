"""What mlp_stack keeps for the backward pass, and computes in it, is what is wanted, and little."""

import pytest
import torch
from test_mlp_stack import Calls, eager, needs_library, stack

from fastres.ops.mlp_stack import mlp_stack


def bytes_kept(fn, args, **kwargs):
    """Bytes of the distinct storages that autograd keeps, but for those of the weights."""
    own = {a.untyped_storage().data_ptr() for a in args[1:] if isinstance(a, torch.Tensor)}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = fn(*args, **kwargs)
    assert y.requires_grad
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)


@needs_library
@pytest.mark.parametrize(("width", "hidden"), [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("trained", ["all", "weights", "biases", "gate", "x"])
def test_it_keeps_at_most_half_of_what_eager_keeps(device, width, hidden, activation, trained):
    tensors = dict(zip(("x", "w1", "b1", "w2", "b2"), stack(8, width, hidden, 300), strict=True))
    tensors["gate"] = torch.ones(300, 8) if trained in ("all", "gate") else None
    of = {"weights": ("w1", "w2"), "biases": ("b1", "b2")}.get(trained, (trained,))
    args = [
        None if t is None else t.to(device).requires_grad_(trained == "all" or name in of)
        for name, t in tensors.items()
    ]
    spare = 0 if trained == "all" else 8 * width * 4  # eager keeps nothing before the first of them
    plain = bytes_kept(eager, args, activation=activation)
    assert bytes_kept(mlp_stack, args, activation=activation) <= plain / 2 + spare


@needs_library
@pytest.mark.parametrize(("width", "hidden"), [(16, 16), (8, 24), (24, 8)])
def test_with_checkpoints_it_keeps_a_twentieth_of_what_eager_keeps(device, width, hidden):
    args = [a.requires_grad_() for a in stack(8, width, hidden, 300, device=device)]
    assert bytes_kept(mlp_stack, args, checkpoint=True) <= bytes_kept(eager, args) / 20


@needs_library
def test_no_gradient_is_computed_that_nobody_wants(device):
    x, *weights = stack(5, 8, 6, 4, device=device)
    y, _ = mlp_stack(x.requires_grad_(), *weights, 0.5)
    with Calls() as calls:
        torch.autograd.grad(y.sum(), x)
    ((name, (_, *others)),) = calls.seen
    assert name == "_mlp_stack_backward"
    assert [t.numel() for t in others] == [0] * 5
