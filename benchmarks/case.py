"""case: a piece of work on one shape, the ways of doing it, and for how long to measure them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clocks import Call

OURS = "fastres"  # the variant that every other one is compared with


@dataclass(frozen=True)
class Variant:
    """One way of doing the work of a case.

    Attributes:
        build: Given one set of inputs, returns the call to time. It may raise UnavailableError.
        bytes: Device memory traffic of one call by the bytes model, or None where there is none.
        around: A context that is open while the call is timed, opened outside the timing.
        capturable: Whether the call may be captured in a CUDA graph.
        limit: Whether this is a limit (a copy, a read) rather than the work itself.
        saved: Given one set of inputs, returns the bytes that a forward pass keeps for its backward
            pass; None where there is none.
    """

    build: Callable[..., Call]
    bytes: float | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    capturable: bool = True
    limit: bool = False
    saved: Callable[..., int] | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work on one shape, and the ways of doing it.

    Attributes:
        name: What is measured, unique within a benchmark together with shape, dtype and layout.
        inputs: Makes one set of inputs: random, never zeros, on the case's device.
        bytes: The fewest bytes that the work must move; 0 where arithmetic is the limit.
        flops: Floating-point operations of the work.
        cached: Whether the buffers are to stay in cache.
        headline: Whether the short tables show it.
        slow: Whether a call takes so long that few rounds must do.
        graphed: Whether a GPU also times it by graph replay.
        goals: Variant prefix -> least ratio to fastres, "limit" -> least fraction of the limit,
            "seconds" -> most seconds, "saved" -> most of the bytes that eager saves.
        judged: The clock by which the goals are judged; by default every one.
        reads: Whether the bytes are read rather than copied, so that the limit reads them as well.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    variants: dict[str, Variant]
    bytes: float
    flops: float
    layout: str = "contiguous"
    cached: bool = True
    headline: bool = False
    slow: bool = False
    graphed: bool = True
    goals: dict[str, float] = field(default_factory=dict)
    judged: str = ""
    reads: bool = False

    @property
    def title(self) -> str:
        """Name, shape, dtype and layout in one line."""
        kind = str(self.dtype).removeprefix("torch.")
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        return f"{self.name} {list(self.shape)} {kind}{layout}"


@dataclass(frozen=True)
class Protocol:
    """How long to measure: at least `rounds[0]` rounds, at most `rounds[1]` or `budget` seconds."""

    rounds: tuple[int, int] = (9, 41)
    budget: float = 4.0
    sample: float = 1e-3  # seconds that one sample lasts at least
    warm_up: float = 0.05  # seconds that each variant runs before it is timed
