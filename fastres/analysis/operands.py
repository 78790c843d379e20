"""operands: what a function makes of skip and branch at every site, in one pass of any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.sites import Add, Site, Watch

Read = Callable[[int, Tensor, Tensor], Any]  # number of the site, skip, branch


class _Reader:
    """The policy: it runs every add as it is, and shows its operands before."""

    def __init__(self, read: Read) -> None:
        self.read, self.found = read, dict[int, Any]()

    def at(self, site: int, call: Add, skip: int) -> Any:
        sides = [side.detach() for side in call.operands]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.found[site] = self.read(site, sides[skip], sides[1 - skip])
        return call.call()

    def passed(self, sites: list[Site]) -> None: ...

    def failed(self) -> None: ...


@torch.no_grad()
def read_operands(op: str, model: nn.Module, x: Tensor, read: Read) -> tuple[list[Site], list[Any]]:
    """Run a model once and call a function at each of its sites.

    A stack of blocks runs block by block for it, so the last bits may differ from a plain pass.

    Args:
        op: Whose errors they are.
        model: Any module; runs in its present mode.
        x: Its input.
        read: Number of the site, skip [B, ...], branch [B, ...] -> anything. The tensors may be
            overwritten once it has returned.

    Returns:
        The sites and what the function returned at each.

    Raises:
        ValueError: If the model has no site.
    """
    reader = _Reader(read)
    with Watch(op, model, reader) as watch:
        model(x)
    sites = [] if watch.plan is None else watch.plan.sites
    if not sites:
        kind = type(model).__name__
        raise ValueError(f"{op}: model must contain a residual add, found none in {kind}")
    return sites, [reader.found[site] for site in range(len(sites))]
