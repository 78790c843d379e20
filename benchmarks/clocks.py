"""clocks: the three ways to time a call: wall clock, CUDA events, and replay of a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


class UnavailableError(Exception):
    """A variant that cannot be measured here; the message is the reason that results report."""


@dataclass(frozen=True)
class Loop:
    """What is timed: `call` makes `per` calls of the variant; `keep` must outlive it."""

    call: Call
    per: int = 1
    keep: tuple[object, ...] = ()


class Clock(Protocol):
    """Times a call; `name` says how."""

    name: str

    def prepare(self, calls: Sequence[Call], rotated: Call, capturable: bool) -> Loop:
        """Make what is timed from the calls on each set of buffers."""

    def elapsed(self, call: Call, times: int) -> float:
        """Make `times` calls and return the seconds that they took."""


class WallClock:
    """Seconds by a host clock; for work that is done when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, name: str = "wall") -> None:
        self._now, self.name = now, name

    def prepare(self, calls: Sequence[Call], rotated: Call, capturable: bool) -> Loop:
        """Time the calls as they are, each on the next set of buffers."""
        return Loop(rotated)

    def elapsed(self, call: Call, times: int) -> float:
        """Make `times` calls and return the seconds that they took."""
        began = self._now()
        for _ in range(times):
            call()
        return self._now() - began


class EventClock:
    """Seconds between two CUDA events: device time, or the host's where the host is slower."""

    name = "events"

    def prepare(self, calls: Sequence[Call], rotated: Call, capturable: bool) -> Loop:
        """Time the calls as the host launches them, each on the next set of buffers."""
        return Loop(rotated)

    def elapsed(self, call: Call, times: int) -> float:
        """Make `times` calls on the current stream and return the seconds between the events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class GraphClock(EventClock):
    """Seconds of replaying a CUDA graph of the calls: device time without the host's launches.

    It must run on a stream of its own, on which the inputs were made: a backward pass is captured
    on the stream of its forward pass.
    """

    name = "graph"
    LENGTH = 1e-3  # seconds that one replay is to last, so that its own launch does not count

    def prepare(self, calls: Sequence[Call], rotated: Call, capturable: bool) -> Loop:
        """Capture one graph that makes the call on every set of buffers, several times over."""
        if not capturable:
            raise UnavailableError("manages its own CUDA graphs: timed by events only")
        for _ in range(3):
            for call in calls:
                call()
        once = self.elapsed(rotated, len(calls))
        repeats = max(1, min(64 // len(calls), round(self.LENGTH / once)))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                for call in calls:
                    call()
        return Loop(graph.replay, repeats * len(calls), keep=(graph, *calls))
