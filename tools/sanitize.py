"""sanitize: runs every operator on small inputs on the GPU, forward and backward, once.

This is what compute-sanitizer watches. Most samples are those of the tests: each class that
inherits OpContract in tests/ names its operator, its reference and its samples. `MORE` are for
operators without such a class, and for kernels that small shapes do not reach. Inputs are made on
the CPU and copied, and results are compared with the reference there, coarsely: exactness is the
tests' business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import contract  # noqa: E402
from test_conv_stack_stages import stage  # noqa: E402
from test_mlp_stack import stack  # noqa: E402

from benchmarks.conv_stack import STAGES  # noqa: E402
from fastres.ops.mlp_stack_paths import lengths  # noqa: E402
from fastres.ops.mlp_stack_paths import reference as lengths_reference  # noqa: E402


class Work(NamedTuple):
    """An operator, its reference, and what both are called with."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    samples: list[contract.Sample]
    dtypes: tuple[torch.dtype, ...] = contract.DTYPES
    derived: bool = True


def more() -> Iterator[Work]:
    """Yield what has no contract, and shapes for the kernels of many samples or one resolution."""
    sample, two = contract.Sample, (torch.float32, torch.bfloat16)
    many = [sample(f"{b} of {d}", stack(b, d, 40, 2)) for b in (2128, 2200) for d in (48, 128)]
    yield Work("mlp_stack", *op_and_reference("mlp_stack"), many, two)
    stages = [
        sample(f"{c} channels", stage(c, side, torch.float32, "cpu", batch=2)) for c, side in STAGES
    ]
    yield Work("conv_stack", *op_and_reference("conv_stack"), stages, two, False)
    skip, branch, of_y = torch.randn(3, 3, 5, 70)
    steps = torch.tensor([0, 1, -2], dtype=torch.int32)
    rows = [
        sample("rows", (skip, branch, of_y[0]), {"tail": True}),
        sample("plain", (None, branch)),
    ]
    rows += [sample("steps", (skip, branch), {"steps": steps})]
    yield Work("path_accumulate", *op_and_reference("path_accumulate"), rows, derived=False)
    shapes = [(3, 24, 40, 9), (2, 1024, 16, 60), (2, 8, 8192, 2)]  # rows, tiles in shared memory
    paths = [
        sample(f"{d} to {h}, {longest}", (*stack(b, d, h, blocks), torch.randn(b, d), longest))
        for b, d, h, blocks in shapes for longest in (1, blocks)
    ]  # fmt: skip
    for precision in ("ieee", "tf32x3", "tf32"):
        op = partial(rows_of, lengths, input_precision=precision)
        reference = partial(rows_of, lengths_reference)
        dtypes = (torch.float32, torch.float64)[: 2 if precision == "ieee" else 1]
        yield Work(f"mlp_stack_paths, {precision}", op, reference, paths, dtypes, False)


def op_and_reference(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return an operator and its reference: its module, which it has the name of, has both."""
    module = import_module(f"fastres.ops.{name}")
    return getattr(module, name), module.reference


def rows_of(of: Callable[..., Any], *args: Any, **options: Any) -> list[torch.Tensor]:
    """Return what is linear in the rows: logarithms are infinite for one that is 0."""
    found = of(*args, keep=True, **options)
    return [found.rows, found.tail, found.gradient, found.dots]


def contracts() -> list[Any]:
    """Return the contract classes of all tests, in the order of their files."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "OpContract" in path.read_text():
            names = vars(import_module(path.stem)).values()
            found += [
                c for c in names if isinstance(c, type) and issubclass(c, contract.OpContract)
            ]
    return [each for each in dict.fromkeys(found) if each is not contract.OpContract]


def results(
    op: Any, sample: Any, dtype: torch.dtype, device: str, derived: bool = True
) -> list[torch.Tensor]:
    """Return the outputs of a call and, where derived, the gradients of its inputs, on the CPU."""
    args, kwargs = sample.to("cpu", dtype)
    args = contract.tree_map(
        lambda a: a.to(device).requires_grad_(derived) if isinstance(a, torch.Tensor) else a, args
    )
    outputs = contract.leaves(op(*args, **kwargs))
    torch.manual_seed(0)
    pulled = [t for t in outputs if t.requires_grad]
    cotangents = [torch.randn(t.shape).to(t.dtype).to(device) for t in pulled]
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    gradients = ()
    if pulled:  # zeros where nothing depends on an input, as on the weights of no blocks
        gradients = torch.autograd.grad(pulled, inputs, cotangents, materialize_grads=True)
    with torch.no_grad():  # and the way that keeps nothing for a backward pass
        outputs += contract.leaves(op(*args, **kwargs))
    return [t.detach().cpu() for t in (*outputs, *gradients)]


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether a result is within 3 % of its reference by norm: wrong is further off."""
    a, b = got.double().flatten(), expected.double().flatten()
    return bool((a - b).norm() <= 0.03 * b.norm() + 1e-6)


def main() -> int:
    """Run all samples in all dtypes; 1 if a result is far from its reference."""
    wrong = calls = 0
    device = sys.argv[1] if sys.argv[1:] else "cuda"
    of_contracts = [Work(c.__name__, c.op, c.reference, list(c.samples())) for c in contracts()]
    for name, op, reference, samples, dtypes, derived in (*of_contracts, *more()):
        for sample in samples:
            for dtype in dtypes:
                calls += 1
                torch.manual_seed(0)
                got = results(op, sample, dtype, device, derived)
                expected = results(reference, sample, dtype, "cpu", derived)
                if not all(map(close, got, expected)):
                    wrong += 1
                    print(f"wrong: {name}, {sample.name}, {dtype}")
    print(f"sanitize: {calls} calls, {wrong} wrong")
    return int(wrong > 0 or calls == 0)


if __name__ == "__main__":
    sys.exit(main())
