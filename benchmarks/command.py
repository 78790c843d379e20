"""command: the command line of every benchmark, and the run over its cases, threads and clocks."""

from __future__ import annotations

import argparse
import gc
import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import limits, machine, results
from benchmarks.case import OURS, Case, Protocol
from benchmarks.clocks import Clock, EventClock, GraphClock, WallClock
from benchmarks.harness import run_case

CPU, CUDA, SMOKE = Protocol(), Protocol((11, 41), 1.0), Protocol((2, 2), 0.0, 0.0, 0.0)
NOT_COMPILED = "^(?!compile)"  # compiling takes seconds: not in a smoke run


def parser() -> argparse.ArgumentParser:
    """Return the command line that all benchmarks share."""
    arguments = argparse.ArgumentParser(description="Measure fastres in interleaved runs.")
    arguments.add_argument("names", nargs="*", help="to run, in this order; all by default")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--threads", type=int, nargs="+", help="CPU threads; 1 and 2 by default")
    arguments.add_argument("--filter", default="", help="only cases whose title has this regex")
    arguments.add_argument("--variants", default="", help="only variants whose name has this regex")
    arguments.add_argument(
        "--no-compile", action="store_true", help="without torch.compile; listed as not measured"
    )
    arguments.add_argument("--smoke", action="store_true", help="tiny shapes, nothing is written")
    arguments.add_argument("--out", type=Path, default=results.FOLDER, help="folder for results")
    arguments.add_argument("--minutes", type=float, default=60.0, help="stop starting cases then")
    arguments.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread's own time, where others use the machine",
    )
    arguments.add_argument("--commit", help="commit of the sources where git cannot tell")
    return arguments


def run(modules: Iterable[ModuleType], argv: list[str] | None = None) -> int:
    """Run benchmark modules as the command line asks; 0 if fastres was measured in every case."""
    arguments = parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks: --device cuda needs an NVIDIA GPU, and torch sees none")
    if arguments.cpu_time and (arguments.device == "cuda" or (arguments.threads or [1]) != [1]):
        raise SystemExit("benchmarks: --cpu-time needs --device cpu and --threads 1")
    known = {module.NAME: module for module in modules}
    for name in set(arguments.names) - set(known):
        raise SystemExit(f"benchmarks: names must be of {', '.join(known)}, got {name}")
    deadline = time.monotonic() + 60 * arguments.minutes
    kept = machine.hold_memory()
    status = 0
    for module in [known[name] for name in arguments.names or known]:
        device = torch.device(arguments.device)
        if not selected(module, device, arguments):
            continue
        report = measure(module, arguments, deadline, kept)
        if not arguments.smoke:
            results.verdict(report)
        for entry in report["not_measured"]:
            print(f"not measured: {entry['variant']}: {entry['reason']} ({len(entry['cases'])})")
            status |= entry["variant"] == OURS
        print("written" if _writes(arguments) else "nothing written: a smoke run, or a part of one")
    return int(status)


def _writes(arguments: argparse.Namespace) -> bool:
    """Tell whether results are kept: those of whole runs are."""
    return not (arguments.smoke or arguments.filter or arguments.variants)


def measure(
    module: ModuleType, arguments: argparse.Namespace, deadline: float, memory: str
) -> dict[str, Any]:
    """Run one benchmark and return its report, as `results` documents it; saved case by case."""
    device = torch.device(arguments.device)
    protocol = SMOKE if arguments.smoke else CUDA if device.type == "cuda" else CPU
    single = device.type == "cuda" or arguments.smoke or arguments.cpu_time
    threads = arguments.threads or ([1] if single else [1, 2])
    report = results.empty(module.NAME, machine.environment(device, arguments.commit), protocol)
    report["protocol"]["memory"] = memory
    for count in threads:
        torch.set_num_threads(count)
        peaks = limits.peaks(device, arguments.smoke)
        report["limits"].append({"threads": count, "gemm_flops": peaks})
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {kind}" for kind, rate in peaks.items())
        print(f"best matrix product with {count} threads: {rates}")
        on = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()
        with on:  # backward passes are captured on the stream of their forward pass: see GraphClock
            for case in _progress(selected(module, device, arguments), f"{count} threads"):
                if time.monotonic() > deadline:
                    results.miss(report, case, "any clock", OURS, "the time given was over")
                    continue
                clocks = clocks_of(case, device, arguments.cpu_time)
                one(case, clocks, device, count, protocol, peaks, report, arguments)
                if _writes(arguments):
                    results.save(report, arguments.out)
    return report


def one(
    case: Case, clocks: list[Clock], device: torch.device, threads: int, protocol: Protocol,
    peaks: dict[str, float], report: dict[str, Any], arguments: argparse.Namespace,
) -> None:  # fmt: skip
    """Measure a case by each of the clocks, and note in the report what came of it."""
    only = arguments.variants or (NOT_COMPILED if protocol is SMOKE else "")
    variants = {**case.variants, **limits.memory(case, device, threads)}
    if arguments.no_compile:
        for name in [v for v in variants if not re.search(NOT_COMPILED, v)]:
            results.miss(report, case, "any clock", name, "left out by --no-compile")
            del variants[name]
    variants = {k: v for k, v in variants.items() if re.search(only, k) or k == OURS or v.limit}
    if any(name.startswith("compile") for name in variants):
        torch._dynamo.reset()  # else the ninth shape of a function is no longer compiled
    if case.slow:
        least, budget = min(5, protocol.rounds[0]), min(60.0, 15 * protocol.budget)
        protocol = replace(protocol, rounds=(least, 41), budget=budget)
    peak = peaks.get(str(case.dtype).removeprefix("torch."), peaks["float32"])
    for clock in clocks:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows, missing = run_case(case, variants, sets(case, device), clock, protocol, peak)
        for variant, reason in missing.items():
            results.miss(report, case, clock.name, variant, reason)
        results.judge(report, case, clock.name, threads, rows)
        results.show(case, clock.name, threads, rows)
        report["rows"] += [{"threads": threads, **row} for row in rows]


def clocks_of(case: Case, device: torch.device, cpu_time: bool) -> list[Clock]:
    """Return the clocks that time a case on a device."""
    if device.type == "cpu":
        return [WallClock(time.process_time, "cpu time") if cpu_time else WallClock()]
    return [EventClock(), GraphClock()] if case.graphed else [EventClock()]


def sets(case: Case, device: torch.device) -> int:
    """Return how many sets of buffers a case rotates over: four caches of traffic."""
    if case.cached:
        return 1
    return max(2, math.ceil(4 * machine.cache(device) / case.bytes))


def selected(module: ModuleType, device: torch.device, arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line selects."""
    cases: Iterator[Case] = module.cases(device, arguments.smoke)
    return [c for c in cases if re.search(arguments.filter, f"{module.NAME} {c.title}")]


def _progress(cases: list[Case], what: str) -> Iterable[Case]:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    bar: Iterable[Case] = tqdm(cases, desc=what, unit="case", disable=None)
    return bar
