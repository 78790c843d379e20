"""gates: the policy that scales the branches of a model, y = skip + gate * branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastres.adds import NORMED, Add, Site, Stack
from fastres.ops import Stats
from fastres.ops.layout import accumulate, scaled
from fastres.watching import Watch

__all__ = ["Gate", "Gates", "GatesLike", "gate"]

Gate = float | Tensor  # a number, or a tensor [] or [B]
GatesLike = Mapping[str, Gate | Callable[[int], Gate]] | Callable[[int], Mapping[str, Gate]]


@contextmanager
def gate(model: nn.Module, gates: GatesLike, step: int = 0) -> Iterator[Gates]:
    """Scale the branches of a model in every forward pass inside the `with` block.

    At a site with gate g the model adds g * branch: 0 deletes the block (what its branch computes
    is computed, and weighs nothing), 1 leaves it as it is, bit for bit. A tensor [B] does so per
    sample; gradients reach gates that require them. Sites that are not named stay as they are.

    What else is open on the model, `record` or `path_gradients` or more gates, sees the gated
    branch, in whatever order it was opened.

    Args:
        model: Any module; not compiled, not scripted.
        gates: Site name -> a number, a tensor [] or [B], or a function of the step that gives one
            of these. Or a function of the step that gives such a dictionary, as those of
            `fastres.schedules` are.
        step: The step of the first pass. Every pass that is completed is one step.

    Yields:
        The Gates: their `step`, and the `sites` after the first pass.

    Raises:
        TypeError: If model is not a module, or is compiled or scripted; if gates are no mapping of
            names or function; if a gate is no number or floating tensor.
        ValueError: If model has lazy parameters, or step is negative; from a pass, if a gate is not
            [] or [B] or is on another device; from the end of the first pass, if there is no
            site of that name.
        RuntimeError: From a later pass in which the sites are not those of the first.

    Example:
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(Block(4, 4), Block(4, 4))
        >>> x = torch.ones(3, 4)
        >>> with gate(model, {"0": 0.0, "1": torch.tensor([0.0, 1.0, 0.5])}):
        ...     y = model(x)
        >>> torch.equal(y[0], x[0]), torch.equal(y[1:2], model[1](x)[1:2])
        (True, True)
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"gate: step must be an integer, got {step!r}")
    if step < 0:
        raise ValueError(f"gate: step must be >= 0, got {step}")
    policy = Gates(type(model).__name__, gates, step)
    with Watch("gate", model, policy):
        yield policy


def gates_at(gates: GatesLike, step: int) -> Mapping[str, Gate]:
    """Return the gates of a step, by site; errors are those of `gate`."""
    if callable(gates):
        now = gates(step)
    else:
        now = {name: g(step) if callable(g) else g for name, g in gates.items()}
    _check_mapping(now)
    return now


class Gates:
    """Policy: scales the branch of every site that has a gate.

    Attributes:
        step: Of the next pass.
        sites: Of the model; empty before the end of the first pass.
    """

    def __init__(self, model: str, gates: GatesLike, step: int = 0) -> None:
        if not callable(gates):
            _check_mapping(gates, schedules=True)
        self.step = step
        self.sites: list[Site] = []
        self._model, self._gates = model, gates
        self._now: Mapping[str, Gate] = {}  # of the pass under way
        self._names: list[tuple[str, ...]] = []  # site -> what it may be called
        self._met: Counter[str] = Counter()

    @property
    def met(self) -> int:
        """How many sites the first pass has met so far."""
        return len(self._names)

    def begin(self) -> None:
        """Ask for the gates of the pass that begins (called by Watch)."""
        now = gates_at(self._gates, self.step)
        if self.sites:
            self._check_names(now)
        self._now = now

    def meet(self, site: int, owner: str) -> None:
        """Learn where a site of the first pass is (called by Watch)."""
        number = self._met[owner]
        self._met[owner] += 1
        named = f"{owner}[{number}]"  # the only one in a module has no number: told at the end
        self._names.append((owner, named) if number == 0 else (named,))

    def at(self, site: int, call: Add, skip: int) -> Any:
        """Run the add of a site with its branch scaled (called by Watch)."""
        found = self._find(site, call.operands[1 - skip])
        if found is None:
            return call.call()
        return _scaled(call, 1 - skip, found).call()

    def stack(self, first: int, call: Stack) -> tuple[Tensor, Stats]:
        """Run a stack with its branches scaled, as one call (called by Watch)."""
        found = [self._find(site, call.x) for site in range(first, first + call.blocks)]
        if all(each is None for each in found):
            return call.call()
        gates = _rows([1.0 if each is None else each for each in found], call.x)
        own = call.bound.arguments["gate"]
        if own is not None:
            own = torch.as_tensor(own, dtype=gates.dtype, device=gates.device)
            if own.dim() == 2 or gates.dim() == 2:
                own, gates = (g[:, None] if g.dim() == 1 else g for g in (own, gates))
            gates = gates * own
        return call.call(gate=gates)

    def passed(self, sites: list[Site]) -> None:
        """Note that a pass is complete (called by Watch)."""
        if not sites:
            raise ValueError(
                f"gate: model must contain a residual add, found none in {self._model}"
            )
        if not self.sites:
            self.sites = list(sites)
            self._names = [(site.name,) for site in sites]
            self._check_names(self._now)
        self.step += 1

    def failed(self) -> None:
        """Forget the pass under way: its step comes again (called by Watch)."""
        if not self.sites:
            self._names, self._met = [], Counter()

    def _find(self, site: int, like: Tensor) -> Gate | None:
        """Return the gate of a site if it is not 1, checked against its branch [B, ...]."""
        name = next((name for name in self._names[site] if name in self._now), None)
        if name is None:
            return None
        found = self._now[name]
        if not isinstance(found, Tensor):
            return None if found == 1 else found
        if found.dim() > 0 and found.shape != like.shape[:1]:
            raise ValueError(
                f"gate: gates[{name!r}] must have shape [] or [{like.size(0)}], "
                f"got {[*found.shape]}"
            )
        if found.device != like.device and not (found.dim() == 0 and found.is_cpu):
            # no TypeError: inside of x + f, Python would say "unsupported operand" instead
            raise ValueError(f"gate: gates[{name!r}] must be on {like.device}, got {found.device}")
        return found

    def _check_names(self, gates: Mapping[str, Gate]) -> None:
        names = [site.name for site in self.sites]
        for name in gates:
            if name not in names:
                near = get_close_matches(name, names, 3, 0.3) or names[:3]
                raise ValueError(
                    f"gate: gates must name sites of the model, such as {', '.join(near)}, "
                    f"got {name!r}"
                )


def _rows(gates: list[Gate], x: Tensor) -> Tensor:
    """Join the gates of the blocks of a stack on x [B, ..., D]: [L], or [L, B] where one is [B]."""
    dtype = accumulate(x.dtype)
    rows = [torch.as_tensor(gate, dtype=dtype, device=x.device) for gate in gates]
    if any(row.dim() for row in rows):
        rows = [row.expand(x.size(0)) for row in rows]
    return torch.stack(rows)


def _scaled(call: Add, side: int, gate: Gate) -> Add:
    """Scale one operand: in place where the sum is written into it, as the model still holds it."""
    if call.func in NORMED:  # the branch is what comes out of the batch norm
        return call.gated(gate)
    branch = call.operands[side]
    product = scaled(branch, gate)
    if not call.writes(side):
        return call.replaced(side, product)
    if product.requires_grad:  # what the product keeps of the branch must not be written over
        product = scaled(branch.clone(), gate)
    branch.copy_(product)
    return call


def _check_mapping(gates: object, schedules: bool = False) -> None:
    """Raise the error that names the argument, if these are no gates by name."""
    if not isinstance(gates, Mapping):
        raise TypeError(
            f"gate: gates must be a mapping of site names, or a function of the step, "
            f"got {type(gates).__name__}"
        )
    for name, value in cast("Mapping[object, object]", gates).items():
        if not isinstance(name, str):
            raise TypeError(f"gate: gates must have the names of sites as keys, got {name!r}")
        if isinstance(value, Real) or (schedules and callable(value)):
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() > 1:
                raise ValueError(
                    f"gate: gates[{name!r}] must have shape [] or [B], got {[*value.shape]}"
                )
            continue
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"gate: gates[{name!r}] must be a number or a floating tensor, got {got}")
