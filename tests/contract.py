"""contract: what every fused operator promises; a test class names an op and inherits it."""

from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jvp, vmap  # noqa: F401
from torch.utils._pytree import tree_flatten, tree_map

from fastres.ops import Stats, native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One call of an operator: tensors by shape, and the other arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device, dtype, requires_grad=False):
        def move(t):
            if not isinstance(t, torch.Tensor):
                return t
            moved = t.detach().to(device, dtype if t.is_floating_point() else t.dtype)
            return moved.requires_grad_(requires_grad and t.is_floating_point())

        return tree_map(move, self.args), self.kwargs

    def draws(self):
        """The call with its own numbers, and with larger ones that round otherwise."""
        for k in range(16, 24):
            yield Sample(self.name, tree_map(partial(_scaled, k / 16), self.args), self.kwargs)


def _scaled(factor, t):
    return t * factor if isinstance(t, torch.Tensor) and factor != 1 else t


def leaves(result):
    return [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]


def differentiable(result):
    return tuple(t for t in leaves(result) if t.requires_grad)


def largest_error(values, exact, of_terms=0.0):
    """Largest elementwise distance from the float64 values, over 1 + their size.

    `of_terms`, which broadcasts, is the size of what a value is the small difference of.
    """
    pairs = [(v.double(), e) for v, e in zip(values, exact, strict=True) if v.numel()]
    scaled = ((v - e).abs() / (1 + e.abs() + of_terms) for v, e in pairs)
    return max((error.max().item() for error in scaled), default=0.0)


def largest_error_of(result, exact):
    """The same of what an operator returns: <x, p> is the small difference of |x| |p|."""
    parts = tree_flatten(exact, is_leaf=lambda part: isinstance(part, Stats))[0]
    cases = zip(leaves(result), leaves(exact), map(_size_of_terms, parts), strict=True)
    return max(largest_error([value], [e], of_terms) for value, e, of_terms in cases)


def _size_of_terms(part):
    if isinstance(part, Stats):
        of_dot = (part.skip_sq * part.branch_sq).sqrt()
        return torch.stack([torch.zeros_like(of_dot)] * 2 + [of_dot], -2)
    return 0.0


class OpContract:
    """Subclass as TestName with `op`, `reference` and the three functions below.

    `reference` is the oracle in float64; `eager` is what a user would write without the operator,
    in the dtype itself, where that is something else.
    """

    op: Any
    reference: Any
    eager: Any = None

    @staticmethod
    def samples():
        raise NotImplementedError

    @staticmethod
    def raw_samples(device):
        """(overload, args) of the private operators, for opcheck."""
        raise NotImplementedError

    @staticmethod
    def exported():
        """A sample, and of each of its arguments the dimension that is the batch, or None."""
        raise NotImplementedError

    def in_eager(self, *args, **kwargs):
        return (type(self).eager or type(self).reference)(*args, **kwargs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_no_less_exact_than_twice_eager(self, device, dtype):
        unit = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
        for sample in self.samples():
            errors = []
            for draw in sample.draws():  # several, as of few numbers some are lucky
                args, kwargs = draw.to(device, dtype)
                ours = type(self).op(*args, **kwargs)
                eager = self.in_eager(*args, **kwargs)
                wide = tree_map(lambda a: a.double() if isinstance(a, torch.Tensor) else a, args)
                exact = type(self).reference(*wide, **kwargs)
                found = largest_error_of(ours, exact), max(largest_error_of(eager, exact), unit)
                errors.append(found)
                ours, eager = leaves(ours), leaves(eager)
                assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in eager]
                assert not ours[0].numel() or ours[0].stride() == eager[0].stride(), sample.name
            of_ours, of_eager = map(mean, zip(*errors, strict=True))
            assert of_ours <= 2 * of_eager, sample.name

    def test_gradients_are_right_twice(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float64, requires_grad=True)
            inputs = tuple(a for a in args if isinstance(a, torch.Tensor))
            if sum(a.numel() for a in inputs) > 400:
                continue
            count = len(differentiable(type(self).op(*args, **kwargs)))  # y first, then the sums

            def call(*tensors, args=args, kwargs=kwargs, count=count):
                fill = iter(tensors)
                full = [next(fill) if isinstance(a, torch.Tensor) else a for a in args]
                return tuple(leaves(type(self).op(*full, **kwargs))[:count])

            assert gradcheck(call, inputs, check_batched_grad=True), sample.name
            assert gradgradcheck(call, inputs), sample.name
            assert gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_gradients_are_no_less_exact_than_twice_eager(self, device, dtype):
        for sample in self.samples():

            def gradients(fn, dtype, sample=sample):
                # the same numbers in every dtype, so that a ReLU decides alike
                args, kwargs = sample.to(device, torch.bfloat16)
                args = tree_map(
                    lambda a: a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a,
                    args,
                )
                outputs = differentiable(fn(*args, **kwargs))
                torch.manual_seed(1)
                cotangents = [torch.randn(o.shape).bfloat16().to(device, o.dtype) for o in outputs]
                inputs = [a for a in args if isinstance(a, torch.Tensor)]
                return torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)

            exact = gradients(type(self).reference, torch.float64)
            eager = largest_error(gradients(self.in_eager, dtype), exact)
            bound = 2 * max(eager, torch.finfo(dtype).eps)
            assert largest_error(gradients(type(self).op, dtype), exact) <= bound, sample.name

    @pytest.mark.skipif(native.C is None, reason="the compiled library is not built")
    def test_raw_operators_pass_opcheck(self, device):
        for overload, args in self.raw_samples(device):
            torch.library.opcheck(overload, args)

    def test_vmap_equals_a_loop(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float32)
            if args[0].numel() > 5000:
                continue
            stacked = tree_map(
                lambda a: torch.stack([a, a.flip(0), -a]) if isinstance(a, torch.Tensor) else a,
                args,
            )
            dims = tuple(0 if isinstance(a, torch.Tensor) else None for a in args)

            def call(*a, kwargs=kwargs):
                return type(self).op(*a, **kwargs)

            each = [
                call(*(a[i] if isinstance(a, torch.Tensor) else a for a in stacked))
                for i in range(3)
            ]
            for got, *one in zip(
                leaves(vmap(call, dims)(*stacked)), *(leaves(e) for e in each), strict=True
            ):
                torch.testing.assert_close(got, torch.stack(one))

    def test_per_sample_gradients_equal_a_loop(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float64)
            if not 0 < args[0].numel() <= 5000:
                continue

            def loss(x, args=args, kwargs=kwargs):
                return type(self).op(x, *args[1:], **kwargs)[0].square().sum()

            stacked = torch.stack([args[0], 2 * args[0]])
            got = vmap(torch.func.grad(loss))(stacked)
            torch.testing.assert_close(
                got, torch.stack([torch.func.grad(loss)(x) for x in stacked])
            )

    def test_a_derivative_sees_through_a_vmap(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float64)
            if not 0 < args[0].numel() <= 40:
                continue

            def loss(fn, x, args=args, kwargs=kwargs):
                return vmap(lambda x: fn(x, *args[1:], **kwargs)[0])(x).square().sum()

            stacked = torch.stack([args[0], -args[0]])
            got, expected = (
                torch.func.grad(lambda x, fn=fn, loss=loss: loss(fn, x))(stacked)
                for fn in (type(self).op, type(self).reference)
            )
            torch.testing.assert_close(got, expected)

    def test_hessian_equals_the_reference(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float64)
            if not 0 < args[0].numel() <= 40:
                continue

            def loss(fn, x, args=args, kwargs=kwargs):
                y, stats = fn(x, *args[1:], **kwargs)
                return y.pow(3).sum() + sum(s.pow(2).sum() for s in leaves(stats))

            torch.testing.assert_close(
                hessian(lambda x: loss(type(self).op, x))(args[0]),
                hessian(lambda x: loss(type(self).reference, x))(args[0]),
            )

    def test_compiles_to_one_graph(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float32, requires_grad=True)
            torch._dynamo.reset()

            def call(*a, kwargs=kwargs):
                return type(self).op(*a, **kwargs)

            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            ours, eager = compiled(*args), call(*args)
            for got, expected in zip(leaves(ours), leaves(eager), strict=True):
                torch.testing.assert_close(got, expected)
            inputs = [a for a in args if isinstance(a, torch.Tensor)]
            for got, expected in zip(
                *(
                    torch.autograd.grad(
                        [t.sum() for t in differentiable(result)], inputs, materialize_grads=True
                    )
                    for result in (ours, eager)
                ),
                strict=True,
            ):
                torch.testing.assert_close(got, expected)

    def test_exports_with_a_dynamic_batch(self, device):
        op = type(self).op
        sample, dims = self.exported()
        args, kwargs = sample.to(device, torch.float32)

        class Model(torch.nn.Module):
            def forward(self, *args):
                y, stats = op(*args, **kwargs)
                return y, stats.branch_sq

        batch = torch.export.Dim("batch", min=2)
        shapes = tuple(None if dim is None else {dim: batch} for dim in dims)
        program = torch.export.export(Model(), args, dynamic_shapes={"args": shapes})
        fewer = [
            a if dim is None else a.narrow(dim, 0, a.size(dim) - 1)
            for a, dim in zip(args, dims, strict=True)
        ]
        for got, expected in zip(program.module()(*fewer), Model()(*fewer), strict=True):
            torch.testing.assert_close(got, expected)

    def test_two_runs_agree_bit_for_bit(self, device):
        for sample in self.samples():
            args, kwargs = sample.to(device, torch.float32)
            runs = [leaves(type(self).op(*args, **kwargs)) for _ in range(3)]
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), (
                    sample.name
                )
