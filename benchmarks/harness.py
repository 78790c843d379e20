"""harness: times variants of one piece of work in one interleaved run, against a measured limit.

Every round times every variant once (A B C A B C ...), so that a slow spell of the machine hits all
of them; the ratio to fastres is the median over rounds of the ratio within a round. Before every
sample the variant is called once, untimed, so that none inherits another's caches. A sample lasts
at least a millisecond: fast calls are repeated within it. Cases out of cache rotate over as many
sets of buffers as fill the last-level cache four times; cases in cache reuse one set. The limit is
a copy of the same number of bytes, or reading them, timed in the same rounds as two more variants;
or the operations at the rate of the best matrix product, where that takes longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.case import OURS, Case, Protocol, Variant
from benchmarks.clocks import Call, Clock, Loop, UnavailableError


@dataclass
class Timed:
    """A variant ready to be timed, and its samples in seconds per call."""

    loop: Loop
    variant: Variant
    inner: int = 1
    samples: list[float] = field(default_factory=list)
    saved: int | None = None  # bytes kept for the backward pass


def rotation(calls: Sequence[Call]) -> Call:
    """Return a call that makes the next of `calls` each time."""
    if len(calls) == 1:
        return calls[0]
    state = {"next": 0}

    def call() -> object:
        at = state["next"]
        state["next"] = (at + 1) % len(calls)
        return calls[at]()

    return call


def calibrate(timed: Timed, clock: Clock, protocol: Protocol) -> None:
    """Warm a variant up, and choose how many calls make a sample long enough."""
    with timed.variant.around():
        spent = 0.0
        for _ in range(2):  # the first calls compile, allocate and fault pages in
            spent += clock.elapsed(timed.loop.call, 1)
        while True:
            seconds = clock.elapsed(timed.loop.call, timed.inner)
            spent += seconds
            if seconds >= protocol.sample and spent >= protocol.warm_up:
                return
            if seconds < protocol.sample:
                timed.inner *= 2


def interleave(timed: Iterable[Timed], clock: Clock, protocol: Protocol) -> None:
    """Time every variant once per round, in the same order, until the rounds or the budget end."""
    timed = list(timed)
    least, most = protocol.rounds
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > protocol.budget:
            return
        for each in timed:
            with each.variant.around():
                each.loop.call()  # what the caches hold, and must write back, is its own
                seconds = clock.elapsed(each.loop.call, each.inner)
            each.samples.append(seconds / each.inner / each.loop.per)


def summarise(samples: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and the median over rounds of the ratio to fastres.

    Example:
        >>> summarise([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])["ratio"]
        2.0
    """
    if len(samples) > 1:
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    else:
        q1 = q3 = samples[0]
    ratio = statistics.median(a / b for a, b in zip(samples, ours, strict=True))
    median = statistics.median(samples)
    return {"median_s": median, "q1": q1, "q3": q3, "samples": len(samples), "ratio": ratio}


def prepare(
    case: Case, variants: dict[str, Variant], sets: int, clock: Clock
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Build every variant on the same sets of inputs; also return why some could not be."""
    inputs = [case.inputs() for _ in range(sets)]
    ready: dict[str, Timed] = {}
    missing: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            with variant.around():
                calls = [variant.build(*each) for each in inputs]
                loop = clock.prepare(calls, rotation(calls), variant.capturable)
                saved = variant.saved(*inputs[0]) if variant.saved else None
            ready[name] = Timed(loop, variant, saved=saved)
        except UnavailableError as reason:
            missing[name] = str(reason)
        except Exception as error:  # a variant that fails must not end the run: it is reported
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return ready, missing


def run_case(
    case: Case, variants: dict[str, Variant], sets: int, clock: Clock, protocol: Protocol,
    peak: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Measure a case by one clock and return its rows, and variant -> reason for what is missing.

    Args:
        case: The case.
        variants: Its variants, and the limits to time with them.
        sets: Sets of buffers to rotate over.
        clock: Wall clock, CUDA events or graph replay.
        protocol: How long to measure.
        peak: Measured floating-point operations per second; 0 where it was not measured.
    """
    ready, missing = prepare(case, variants, sets, clock)
    if OURS not in ready:
        return [], missing
    for timed in ready.values():
        calibrate(timed, clock, protocol)
    interleave(ready.values(), clock, protocol)
    ours = ready[OURS].samples
    copies = [statistics.median(t.samples) for t in ready.values() if t.variant.limit]
    floor = max(case.flops / peak if peak else 0.0, min(copies, default=0.0))
    shared = {"case": case.name, "shape": list(case.shape), "layout": case.layout,
              "dtype": str(case.dtype).removeprefix("torch."), "headline": case.headline,
              "cached": case.cached, "bytes": case.bytes, "flops": case.flops,
              "clock": clock.name}  # fmt: skip
    return [
        {**shared, **row(name, each, ours, case, floor)} for name, each in ready.items()
    ], missing


def row(name: str, timed: Timed, ours: Sequence[float], case: Case, floor: float) -> dict[str, Any]:
    """Return what a result file says of one variant; `floor` is the time of the limit, or 0."""
    figures = summarise(timed.samples, ours)
    model, median = timed.variant.bytes, figures["median_s"]
    saved = {} if timed.saved is None else {"saved_bytes": timed.saved}
    return {
        "variant": name, "limit": timed.variant.limit, **figures,
        "inner": timed.inner * timed.loop.per, "gb_per_s": case.bytes / median / 1e9,
        "fraction": floor / median if floor else None,
        "predicted": model / case.bytes if model and case.bytes else None, **saved,
    }  # fmt: skip
