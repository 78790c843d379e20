"""measuring: a residual add as the model wrote it, and its three sums from the same pass."""

from __future__ import annotations

import threading
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from fastres.adds import MEASURED, Add
from fastres.declaring import add, is_heard
from fastres.ops import native
from fastres.ops.layout import DTYPES, accumulate, has_dense_samples
from fastres.ops.stats import sums_of

_sum: Final = native.raw("_residual_add")
_sum_into: Final = native.raw("_residual_add_")
_SMALL: Final = 1 << 17  # bytes: a second pass in the cache takes 5 us, the dispatch mode 30
_ADD: Final = torch.ops.aten.add.Tensor
_ADD_INTO: Final = torch.ops.aten.add_.Tensor


class _Fused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd, does the one add of a site by the kernel that also returns its sums."""

    sums: Tensor | None = None  # [3, B], of the two operands in order

    def __enter__(self) -> Self:
        # Not TorchDispatchMode's own: its flags are global, and two threads leave them wrong.
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and the guard costs time at every add

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _ADD and self.sums is None:
            y, self.sums = _sum(args[0], args[1], None, False)
            return y
        if func is _ADD_INTO and self.sums is None:
            self.sums = _sum_into(args[0], args[1], args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


class _Local(threading.local):
    fused: _Fused | None = None  # the one at work: an outer record shares the sums of an inner one


_local: Final = _Local()


def measure(call: Add) -> tuple[Any, Tensor]:
    """Run an add and return its result, bit for bit, with the sums of its two sides.

    The sums are [3, B]: of a * a, b * b and a * b per sample, with a and b the operands in order.

    Autograd sees the add it always saw. Where the kernel cannot take the operands, the sums are
    computed beside it in plain PyTorch.

    Args:
        call: The add, of two tensors [B, ...].
    """
    if call.func in MEASURED:
        out = call.call()
        return out, out[1].sums.detach()
    if _local.fused is not None:
        out, sums = call.call(), _local.fused.sums
    elif not _fits(call):
        sums = _reference(call)  # before the add, which may be in place
        out = call.call()
    elif call.func is not Tensor.add_ and _is_underived(call):
        out, sums = _sum(*call.operands, None, False)
    elif call.operands[0].nbytes <= _SMALL:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            _, sums = _sum(*call.operands, None, False)  # before the add, which may be in place
        out = call.call()
    else:
        _local.fused = fused = _Fused()  # type: ignore[no-untyped-call]
        try:
            with fused:
                out = call.call()
        finally:
            _local.fused = None
        sums = fused.sums
    assert sums is not None
    return out, sums


def _fits(call: Add) -> bool:
    """Tell whether the kernel may take the operands, and the call is a plain or in-place sum."""
    a, b = call.operands
    plain = call.func is add or not call.kwargs
    return (
        _sum is not None
        and plain
        and type(a) is Tensor
        and type(b) is Tensor
        and a.dtype is b.dtype
        and a.dtype in DTYPES
        and a.device == b.device
        and native.runs_on(a)
        and a.stride() == b.stride()
        and has_dense_samples(a)
    )


def _is_underived(call: Add) -> bool:
    """Tell whether no derivative is wanted and nobody else watches: the kernel may run alone."""
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in call.operands))
        and forward_ad._current_level < 0
        and not (call.func is add and is_heard())
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _reference(call: Add) -> Tensor:
    """Return [3, B] in plain PyTorch, never in half precision."""
    dtype = accumulate(torch.promote_types(*(t.dtype for t in call.operands)))
    with torch.no_grad(), torch._C.DisableTorchFunction():  # another Watch must not see it
        a, b = (t.detach().to(dtype) for t in call.operands)
        return sums_of(a, b * call.kwargs.get("alpha", 1))  # of a + alpha * b
