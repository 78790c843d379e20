"""Operators give the same bits in 100 runs, with any number of threads, recorded or not."""

from __future__ import annotations

import pytest
import torch
from contract import differentiable, leaves
from test_batch_norm_residual import images
from test_conv_stack import stack as conv_blocks
from test_mlp_stack import stack
from test_mlp_stack_paths import draw
from test_path_accumulate import problem

import fastres
from fastres.nn import ResidualMLP
from fastres.ops import batch_norm_residual, conv_stack, mlp_stack, path_accumulate, residual_add
from fastres.ops.mlp_stack_paths import lengths
from fastres.threads import threads


def of_residual_add(device):
    x, f, *_ = images(6, 40, 30, 31, device=device)
    return residual_add, (x, f, None, True), {}


def of_batch_norm_residual(device):
    x, f, weight, bias = images(6, 40, 30, 31, device=device)
    return batch_norm_residual, (x, f, None, None, weight, bias, None, True), {"training": True}


def of_mlp_stack(device):
    return mlp_stack, stack(70, 48, 33, 5, device=device), {}


def of_conv_stack(device):
    return conv_stack, conv_blocks(3, 40, 9, 20, 2, device=device), {}


def of_path_accumulate(device):
    skip, branch, named = problem(9, 4, 5000, device=device)
    return path_accumulate, (skip, branch), {**named, "tail": True}


def of_lengths(device):
    given = [t.float() for t in draw(37, 24, 40, 6, device=device)]
    return lengths, tuple(given), {"keep": True}


@pytest.fixture(
    params=[
        *(of_residual_add, of_batch_norm_residual, of_mlp_stack, of_conv_stack),
        *(of_path_accumulate, of_lengths),
    ],
    ids=lambda each: each.__name__.removeprefix("of_"),
)
def call(request, device):
    """Outputs and, of operators with a gradient, gradients."""
    op, args, options = request.param(device)
    derived = op not in (conv_stack, path_accumulate, lengths)  # or not by a kernel

    def run():
        given = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        inputs = [a.requires_grad_(derived) for a in given if isinstance(a, torch.Tensor)]
        values = leaves(op(*given, **options))
        if not derived:
            return values
        pulled = torch.autograd.grad(
            [o.sin().sum() for o in differentiable(values)], inputs, materialize_grads=True
        )
        return [*(v.detach() for v in values), *pulled]

    return run


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_100_runs_are_the_same(call, record_property):
    first = call()
    assert all(same(first, call()) for _ in range(99))
    record_property("runs the same", 100)


def test_any_number_of_threads_gives_the_same(call):
    first = call()
    for count in (1, 2, 3, 7):
        with threads(count):
            assert same(first, call())


def test_a_recorded_model_computes_the_same(device):
    torch.manual_seed(0)
    model = ResidualMLP(12, 5, width=32, blocks=7).to(device)
    x = torch.randn(9, 12, device=device)

    def run():
        out = model(x)
        return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))]

    plain = run()
    with fastres.record(model):
        assert same(plain, run())
