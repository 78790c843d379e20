"""fused: what a fused block runs, and its class, which is the class it had with another forward."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import count
from typing import Any, ClassVar, Final, SupportsIndex, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from fastres.declaring import add, fused_add, fused_norm
from fastres.fusing.folding import KEPT, Basic
from fastres.fusing.sequences import Mlp, run_sequence
from fastres.hooks import Hook, Idle, has_no_hooks, is_hooked
from fastres.ops import native
from fastres.ops.batch_norm_residual_inner import batch_norm_inner
from fastres.ops.recomputing import Recomputing

_numbers: Final = count()
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Branch = tuple[Tensor, nn.Module | None]  # and the batch norm that is still to come
Channels = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # [C] each


def is_bare(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Tell whether a module is exactly of one of these types and has nothing of its own on it.

    The hooks of a policy do not count: it sees the fused call itself.
    """
    return type(module) in types and has_no_hooks(module, (Hook, Idle))


def norm_of(tail: nn.Module) -> nn.Module | None:
    """Return the batch norm that a module is, or that a Sequential ends in."""
    while isinstance(tail, nn.Sequential) and is_bare(tail, nn.Sequential) and len(tail):
        tail = tail[-1]
    return tail if is_bare(tail, *NORMS) else None


def is_shared(norm: nn.Module) -> bool:
    """Tell whether a batch norm takes its statistics from other processes too: torch reduces them.

    Then it runs as a module of its own, and what comes after it is still one operator.
    """
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return False
    return dist.is_available() and dist.is_initialized()


def run_branch(tail: nn.Module, x: Tensor) -> Branch:
    """Run the end of a branch, but not the batch norm that it ends in: `join` does.

    Decided at every call, so that a batch norm which has been exchanged, or has got a hook, or is
    on a device without kernels, runs as it would without fastres.
    """
    norm = None if is_hooked() or not native.runs_on(x) else norm_of(tail)
    if norm is None or is_shared(norm):
        return tail(x), None
    while tail is not norm:
        *parts, tail = cast("nn.Sequential", tail).children()
        x = _run_parts(parts, x)
    norm._check_input_dim(x)  # type: ignore[operator]
    return x, norm


def _run_parts(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, a batch norm and the ReLU after it as one."""
    at = 0
    while at < len(parts):
        if at + 1 < len(parts) and is_bare(parts[at], *NORMS) and is_bare(parts[at + 1], nn.ReLU):
            x = activated(parts[at], x, parts[at + 1])
            at += 2
        else:
            x = parts[at](x)
            at += 1
    return x


def activated(norm: nn.Module, f: Tensor, relu: nn.Module | None = None) -> Tensor:
    """Run a batch norm within a branch, and the ReLU after it: that module, or the function."""
    bare = is_bare(norm, *NORMS) and (relu is None or is_bare(relu, nn.ReLU))
    if (
        not bare
        or is_shared(norm)
        or is_hooked()
        or not native.runs_on(f)
        or torch.compiler.is_compiling()
    ):
        f = norm(f)
        return F.relu(f) if relu is None else relu(f)
    norm._check_input_dim(f)  # type: ignore[operator]
    statistics, options = _statistics(cast("nn.BatchNorm2d", norm))
    return batch_norm_inner(f, *statistics, True, **options)


def join(
    skip: Tensor, branch: Branch | Tensor, relu: nn.Module | bool = False, into: bool = False
) -> Tensor:
    """Add a branch to its skip, after its batch norm and before the ReLU, if there are any.

    Args:
        skip: [B, ...].
        branch: [B, ...], or what `run_branch` returned.
        relu: Whether there is a ReLU, or the module of it.
        into: Whether the sum was written into the branch, and had its dtype.
    """
    f, norm = (branch, None) if isinstance(branch, Tensor) else branch
    plain = isinstance(relu, bool) or (is_bare(relu, nn.ReLU) and not is_hooked())
    if skip.shape != f.shape or not plain or not native.runs_on(f):
        y = add(skip, f if norm is None else norm(f))
        y = y.to(f.dtype) if into else y
        return y if relu is False else F.relu(y) if relu is True else relu(y)
    if norm is not None:
        y = _normed(cast("nn.BatchNorm2d", norm), skip, f, relu is not False)
    else:
        y = add(skip, f) if relu is False else fused_add(skip, f, None, True)[0]
    return y.to(f.dtype) if into else y


def _normed(norm: nn.BatchNorm2d, skip: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Run the operator as `norm` would run: the rules are those of nn.BatchNorm2d.forward."""
    statistics, options = _statistics(norm)
    return fused_norm(skip, f, *statistics, None, relu, **options)[0]


def _statistics(norm: nn.BatchNorm2d) -> tuple[Channels, dict[str, Any]]:
    """Return running mean and variance, weight, bias, and the options that go with them."""
    tracks = norm.training and norm.track_running_stats
    count = norm.num_batches_tracked if tracks else None
    kept = tracks or not norm.training
    options = {
        "training": norm.training or norm.running_mean is None,
        "momentum": 0.0 if norm.momentum is None and count is None else norm.momentum,
        "eps": norm.eps,
        "num_batches_tracked": count,
    }
    mean, var = (norm.running_mean, norm.running_var) if kept else (None, None)
    return (mean, var, norm.weight, norm.bias), options


@dataclass(frozen=True)
class Code:
    """The forward of a fused block, as it was written from its graph.

    Attributes:
        source: Python, with a function `forward`; in it `_original` is the class it had.
        names: What it reads besides that and its arguments.
        reads: Attributes that the original forward read: it may do something else when one is set.
            What is in a list or a dict is none.
        recomputes: Whether it keeps less, and computes it again in the backward pass.
        mlp: What the block is, if it is one of an MLP.
        basic: What the block is, if a stack can hold it.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    reads: frozenset[str]
    recomputes: bool = False
    mlp: Mlp | None = None
    basic: Basic | None = None


SEQUENCE: Final = Code(
    "def forward(self, input):\n    return run_sequence(self, input)\n",
    (("run_sequence", run_sequence),),
    frozenset(),
)


class Fused(nn.Module):
    """What all fused blocks have besides their own class: a way back."""

    _fused_from: ClassVar[type[nn.Module]]
    _fused_code: ClassVar[Code]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the block gets its own forward back if that has read it."""
        if name in self._fused_code.reads:
            object.__setattr__(self, "__class__", self._fused_from)
            self.__dict__.pop(KEPT, None)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copy and pickle it as its own class, and the way to make the other."""
        made = super().__reduce_ex__(protocol)
        assert isinstance(made, tuple)
        state = {name: value for name, value in made[2].items() if name != KEPT}
        return revived, (self._fused_from, self._fused_code), state, *made[3:]


def is_fusible(kind: type[nn.Module]) -> bool:
    """Tell whether modules of a class are copied and pickled in the common way."""
    names = ("__reduce__", "__reduce_ex__", "__getstate__")
    common = all(getattr(kind, name) == getattr(nn.Module, name) for name in names)
    return common and not hasattr(kind, "__deepcopy__")


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward pass keep the way to what it computed, where one is known."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with Recomputing(args):
            return forward(*args, **kwargs)

    return call


@lru_cache(None)
def fused_class(original: Any, code: Code) -> type[nn.Module]:
    """Make the class of the fused blocks of a class: the same, with another forward."""
    space = dict(fx.Graph().python_code("self").globals) | dict(code.names)
    space["_original"] = original
    file = f"<fused {original.__qualname__} {next(_numbers)}>"
    lines = code.source.splitlines(keepends=True)
    linecache.cache[file] = (len(code.source), None, lines, file)  # for tracebacks and inspect
    exec(compile(code.source, file, "exec"), space)
    forward: Callable[..., Any] = space["forward"]
    forward.__doc__ = original.forward.__doc__
    body = {
        "_fused_from": original,
        "_fused_code": code,
        "forward": _recomputing(forward) if code.recomputes else forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Fused{original.__name__}", (Fused, original), body)


def revived(original: type[nn.Module], code: Code) -> nn.Module:
    """Make an empty fused block, for copy and pickle."""
    kind = fused_class(cast("Any", original), code)
    return kind.__new__(kind)
