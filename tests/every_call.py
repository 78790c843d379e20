"""Every operator and policy by name, as a call of one size, for what is done to all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contract import differentiable, leaves
from drawing import DTYPES, laid_out
from drawing import normal as drawn

import fastres
from fastres.nn import ResidualMLP
from fastres.ops import batch_norm_residual, mlp_stack, native, path_accumulate, residual_add
from fastres.ops.mlp_stack_paths import lengths

Call = Callable[[int, int, int, torch.dtype], object]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return drawn(shape, seed).to(dtype)


def pulled(op, *args, **options):
    """Call an operator and pull cotangents back, through the sums too."""
    tensors = [t.requires_grad_() for t in args if isinstance(t, torch.Tensor)]
    values = leaves(op(*args, **options))
    outputs = [t.float().sin().sum() for t in differentiable(values)]
    return *values, *torch.autograd.grad(outputs, tensors, materialize_grads=True)


def add(samples, features, blocks, dtype):
    x, f = (normal(samples, features, dtype=dtype, seed=n) for n in (0, 1))
    gate = normal(samples, dtype=dtype, seed=2) if blocks % 2 else None
    return pulled(residual_add, x, laid_out(f, "moved"), gate, blocks % 3 == 0)


def norm_add(samples, features, blocks, dtype):
    x, f = (normal(samples, features, blocks, 3, dtype=dtype, seed=n) for n in (0, 1))
    layout = "channels_last" if blocks % 2 else "dense"
    weight, bias = (normal(features, dtype=dtype, seed=n) for n in (2, 3))
    gate = normal(samples, dtype=dtype, seed=4) if blocks % 3 else None
    args = laid_out(x, layout), laid_out(f, layout), None, None, weight, bias, gate, True
    return pulled(batch_norm_residual, *args, training=True)


def weights(features, blocks, dtype):
    hidden = features + 3
    shapes = (hidden, features), (hidden,), (features, hidden), (features,)
    return [normal(blocks, *s, dtype=dtype, seed=n) / 8 for n, s in enumerate(shapes)]


def stack(samples, features, blocks, dtype):
    x = normal(samples, features, dtype=dtype)
    gate = normal(blocks, samples, dtype=dtype) if blocks % 2 else None
    activation = ("relu", "gelu", "tanh", "silu")[blocks % 4]
    return pulled(mlp_stack, x, *weights(features, blocks, dtype), gate, activation)


def rows(samples, features, blocks, dtype):
    skip, branch = (normal(blocks, samples, features, dtype=dtype, seed=n) for n in (0, 1))
    gradient, before = (normal(samples, features, dtype=dtype, seed=n) for n in (2, 3))
    steps = torch.arange(blocks, dtype=torch.int32)
    return path_accumulate(
        skip, branch, gradient=gradient, before=before, steps=steps, tail=blocks % 2 == 0
    )


def stack_lengths(samples, features, blocks, dtype):
    dtype = torch.float32 if dtype.itemsize < 4 else dtype
    x, g = (normal(samples, features, dtype=dtype, seed=n) for n in (5, 6))
    return leaves(lengths(x, *weights(features, blocks, dtype), g, keep=True).rows)


def arrays(samples, features, blocks, dtype):
    """Call the kernels on NumPy arrays."""
    dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    x, f = (normal(samples, features, dtype=dtype, seed=n).numpy() for n in (0, 1))
    given = [w.numpy() for w in weights(features, blocks, dtype)]
    return (
        native.C.residual_add(x, f),
        native.C.batch_norm_residual(x, f, relu=True),
        native.C.mlp_stack(x, *given),
        native.C.path_accumulate(None, x[None], f),
    )


def network(features, blocks):
    torch.manual_seed(0)
    return ResidualMLP(features, 3, width=features, blocks=blocks)


def recorded(samples, features, blocks, dtype):
    model = network(features, min(blocks, 3))
    with fastres.record(model) as tape:
        model(normal(samples, features, dtype=torch.float32)).sum().backward()
    return tape.scaled


def gated(samples, features, blocks, dtype):
    model = network(features, 2)
    with fastres.gate(model, {"stack[0]": 0.5}):
        return model(normal(samples, features, dtype=torch.float32))


def separated(samples, features, blocks, dtype):
    model, x = network(features, min(blocks, 3)), normal(samples, features, dtype=torch.float32)
    return fastres.path_gradients(model, x, lambda y: y.square().sum()).norms


OPERATORS: dict[str, Call] = {
    "residual_add": add,
    "batch_norm_residual": norm_add,
    "mlp_stack": stack,
    "path_accumulate": rows,
    "mlp_stack_paths": stack_lengths,
}
POLICIES: dict[str, Call] = {"record": recorded, "gate": gated, "path_gradients": separated}
EVERY: dict[str, Call] = {**OPERATORS, **POLICIES, **({"arrays": arrays} if native.C else {})}
DTYPE_OF = dict(zip(("float64", "float32", "bfloat16", "float16"), DTYPES, strict=True))
