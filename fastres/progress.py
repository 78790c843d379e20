"""progress: a bar on stderr for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What long work needs of a progress bar."""

    def update(self, n: int) -> object:
        """Advance by n steps."""


class _NoBar:
    def update(self, n: int) -> object:
        return None


@contextmanager
def bar(label: str | None, steps: int, unit: str = "step") -> Iterator[Bar]:
    """Open a progress bar on stderr, or nothing without a label or without tqdm.

    Args:
        label: What stands before the bar; None for no bar.
        steps: How many steps there are.
        unit: What a step is called.

    Yields:
        The bar.
    """
    if label is None:
        yield _NoBar()
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _NoBar()
        return
    # a log file gets a line now and then, a terminal a bar that moves
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=steps, desc=label, unit=unit, mininterval=interval) as shown:
        yield shown
