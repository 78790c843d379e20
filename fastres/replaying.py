"""replaying: passes that differ from one place on share what they compute before it.

What the modules before the first difference return is known from the pass before, and they return
it again without running. That is exact in any model in which equal inputs give equal outputs, be it
a stack or not: a long skip gets what it got.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn


class Unit:
    """A module that runs, or returns what it returned before; it is the module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Callable[..., Any] = module.forward
        self.source: Unit = self  # whose forward runs here
        self.replays = False
        self.calls = 0  # of the first pass
        self.sites = range(0)  # that run in it, by number
        self.ended = 0  # number of sites that have run when it ends
        self.counted: Callable[[], int] | None = None  # how many have run so far
        self._known: Tensor | None = None
        self._given: Tensor | None = None
        self._version = 0
        self._changes = False  # what it returns is written to by others: copies are kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or return what is known."""
        if self.replays:
            assert self._known is not None
            return self._known.clone() if self._changes else self._known
        before = self.counted() if self.counted else 0
        out = self.source.forward(*args, **kwargs)
        if self.counted:
            self.calls += 1
            self.ended = self.counted()
            self.sites = range(before, self.ended)
        self._known = None
        if isinstance(out, Tensor):
            self._given, self._version = out, out._version
            self._known = out.clone() if self._changes else out
        return out

    @property
    def can_replay(self) -> bool:
        """Tell whether what it returns can be kept: one tensor, from one call in a pass."""
        return self.calls == 1 and self._known is not None

    def settle(self) -> None:
        """Note, after the first pass, whether what was returned has been written to since."""
        self.counted = None
        if self._given is not None and self._given._version != self._version:
            self._changes, self._known = True, None

    def clear(self) -> None:
        """Forget what is known."""
        self._known = self._given = None
        self.replays = False


class Replay:
    """Lets the modules of a model be replayed, for the length of a `with` block.

    Units are the modules that own a site, and the largest modules that own none, so that the
    branch of a block that differs only in its gate does not run again either.

    Args:
        model: In eval mode, so that equal inputs give equal outputs.
        owners: Names of the modules whose forward contains a site.
        within: Whether modules inside of owners are units too: not where owners change places.
    """

    def __init__(self, model: nn.Module, owners: Collection[str], within: bool = True) -> None:
        self.units: list[Unit] = []  # after the first pass, in the order in which they end
        units = [Unit(module) for module in _units(model, set(owners), within)]
        self._found = {id(unit.module): unit for unit in units}
        self._own: list[Unit] = []  # whose module had a forward of its own

    def __enter__(self) -> Self:
        for unit in self._found.values():
            if "forward" in vars(unit.module):
                self._own.append(unit)
            unit.module.forward = unit
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for unit in self._found.values():
            if unit in self._own:
                unit.module.forward = unit.forward
            else:
                del unit.module.forward
            unit.clear()

    def unit(self, module: nn.Module) -> Unit | None:
        """Return the unit that a module is."""
        return self._found.get(id(module))

    def begin(self, counted: Callable[[], int]) -> None:
        """Watch the pass that comes: `counted` tells how many sites have run."""
        for unit in self._found.values():
            unit.counted = counted

    def settle(self) -> None:
        """Take the order of the units from the pass that has ended."""
        for unit in self._found.values():
            unit.settle()
        self.units = sorted(self._found.values(), key=lambda unit: unit.ended)

    def up_to(self, site: int) -> frozenset[int]:
        """Replay, from now on, all that ends before a site runs; return the sites that do not run.

        What a unit returns depends on what ran before it, so after a pass in which other things
        were done from `site` on, the units before it still know what they return.
        """
        skipped: set[int] = set()
        for unit in self.units:
            unit.replays = unit.ended <= site and unit.can_replay
            skipped.update(unit.sites if unit.replays else ())
        return frozenset(skipped)

    def clear(self) -> None:
        """Forget all outputs, as for the next batch."""
        for unit in self._found.values():
            unit.clear()


def _units(model: nn.Module, owners: set[str], within: bool) -> Iterator[nn.Module]:
    """Yield the modules that are units; a module under two names once."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[nn.Module]:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            inside = any(owner.startswith(f"{path}.") for owner in owners)
            if id(child) in seen:
                continue
            if path in owners or not inside:
                seen.add(id(child))
                yield child
            if (path in owners and within) or (path not in owners and inside):
                yield from walk(child, path)

    yield from walk(model, "")
