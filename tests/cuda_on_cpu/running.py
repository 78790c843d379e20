"""running: every case of a room on fibers, as a program of its own: library and seed are given."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any


def run_all(
    make: Callable[[str, int], Any],
    cases: Callable[[int], Iterable[Any]],
    kernel: Callable[[Any, Any], str] = lambda *_: "fibers",
) -> None:
    """Run every case, and count them by kernel; an error ends it."""
    runner, counts = make(sys.argv[1], int(sys.argv[2])), Counter[str]()
    for case in cases(runner.seed):
        runner.run(case)
        counts[kernel(runner, case)] += 1
    for name, count in sorted(counts.items()):
        print(f"{count} cases on {name}, seed {runner.seed}")
