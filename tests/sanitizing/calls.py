"""Call all that the library has, under a sanitizer: `python -m sanitizing.calls address|thread`.

The last line is a JSON object: how many calls were made, and which faults were caught.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile
import threading

import torch
from every_call import DTYPES, EVERY, OPERATORS
from torch.utils.data import DataLoader, Dataset

from fastres.ops import native

FAULTS = {
    "address": {
        # Of a register of 64 bytes it says "unknown-crash", and where that is.
        "past_the_end": "AddressSanitizer.*forward_segment.*160-byte region",
        "misaligned": "misaligned address.*\n.*forward_segment",
    },
    "thread": {"race": "data race.*forward_segment"},
}
# samples, features, blocks: one of each; around tiles; long rows; deep enough to go in turns; wide
# enough for a team of threads.
SIZES = [(1, 1, 1), (2, 5, 2), (3, 16, 3), (17, 33, 2), (5, 65, 4), (3, 32769, 1)]
STACKS = [(131, 9, 32), (3, 64, 2), (16, 96, 3), (33, 70, 2), (1, 600, 2)]


def caught(fault: str, expected: str) -> bool:
    """Commit a fault in a process of its own; tell whether the sanitizer ended it."""
    with tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            getattr(native.C, fault)()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        text = report.read()
    found = status != 0 and re.search(expected, text, re.DOTALL)
    print(f"{fault}: caught" if found else f"{fault}: not caught\n{text}", flush=True)
    return bool(found)


def call_all(names=EVERY, sizes=(), dtypes=DTYPES) -> int:
    """Call each at each size in each dtype."""
    plan = [*itertools.product(names, sizes, dtypes)]
    for name, size, dtype in plan:
        if size[1] <= 1000 or name in ("residual_add", "path_accumulate"):
            EVERY[name](*size, dtype)
    return len(plan)


def call_from_threads(count: int, sizes) -> int:
    """Call all from several threads at once."""
    made = []
    work = [threading.Thread(target=lambda: made.append(call_all(EVERY, sizes, [torch.float32])))
            for _ in range(count)]  # fmt: skip
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(made) == count
    return sum(made)


class Called(Dataset):
    """A dataset whose items are made by the operators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        call_all(OPERATORS, [(i + 1, 7, 2)], [torch.float32])
        return torch.tensor(i)


def call_wrongly() -> int:
    """Give raw operators what they must refuse."""
    x = torch.ones(3, 4)
    wrong = [
        lambda: native.raw("_residual_add")(x, x[:2], None, False),
        lambda: native.raw("_residual_add")(x, x, x[0], False),
        lambda: native.raw("_residual_add")(x.int(), x.int(), None, False),
        lambda: native.raw("_path_accumulate")(x, x, None, None, None, 2, False),
        lambda: native.raw("_mlp_stack")(x, *[x] * 4, None, 1, 0, 0, False, False),
        lambda: native.C.residual_add(x.numpy(), x.numpy()[:2]),
        lambda: native.C.mlp_stack(x.numpy(), *[x.numpy()] * 4),
    ]
    for each in wrong:
        try:
            each()
        except (RuntimeError, ValueError, TypeError):
            continue
        raise AssertionError("an operator took what it must refuse")
    return len(wrong)


def main(kind: str, stacks: bool) -> None:
    """Run all parts; what a sanitizer finds ends the process."""
    faults = [name for name, expected in FAULTS[kind].items() if caught(name, expected)]
    calls = call_all(EVERY, SIZES)
    calls += call_all(["mlp_stack", "mlp_stack_paths"], STACKS, DTYPES if stacks else DTYPES[1:2])
    # Forked while no thread ends: it may hold a lock of the sanitizer's, and in the fork for ever.
    calls += 5 * len([*DataLoader(Called(), batch_size=None, num_workers=2, timeout=120)])
    calls += call_from_threads(4, SIZES[1:4]) + call_wrongly()
    library = native.C.build_info()["compiler"], native.C.build_info()["isa_in_use"]
    print(json.dumps({"calls": calls, "faults": faults, "library": library}))
    sys.exit(len(faults) != len(FAULTS[kind]))


if __name__ == "__main__":
    main(sys.argv[1], "all" in sys.argv)
