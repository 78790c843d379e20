"""sanitize: runs every operator's contract samples on the GPU, forward and backward, once.

This is what compute-sanitizer watches. The samples are those of the tests: each class that
inherits OpContract in tests/ names its operator, its reference and its samples. Inputs are made on
the CPU and copied, and results are compared with the reference there, coarsely: exactness is the
tests' business.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import contract  # noqa: E402


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


def results(op: Any, sample: Any, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return the outputs of a call and the gradients of its inputs, all on the CPU."""
    args, kwargs = sample.to("cpu", dtype)
    args = contract.tree_map(
        lambda a: a.to(device).requires_grad_() if isinstance(a, torch.Tensor) else a, args
    )
    outputs = contract.leaves(op(*args, **kwargs))
    torch.manual_seed(0)
    pulled = [t for t in outputs if t.requires_grad]
    cotangents = [torch.randn(t.shape).to(t.dtype).to(device) for t in pulled]
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    gradients = torch.autograd.grad(pulled, inputs, cotangents) if pulled else ()
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
    for each in contracts():
        for sample in each.samples():
            for dtype in contract.DTYPES:
                calls += 1
                torch.manual_seed(0)
                got = results(each.op, sample, dtype, sys.argv[1] if sys.argv[1:] else "cuda")
                expected = results(each.reference, sample, dtype, "cpu")
                if not all(map(close, got, expected)):
                    wrong += 1
                    print(f"wrong: {each.__name__}, {sample.name}, {dtype}")
    print(f"sanitize: {calls} calls, {wrong} wrong")
    return int(wrong > 0 or calls == 0)


if __name__ == "__main__":
    sys.exit(main())
