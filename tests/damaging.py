"""damaging: files as disks, networks and people leave them: bits flipped, cut off, exchanged."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastres.formats import DataError

WAYS = ("flipped", "cut off", "longer", "shorter inside", "zeroed", "exchanged")


def damaged(
    whole: bytes, other: bytes, source: random.Random, ends: int = 1 << 62
) -> tuple[str, bytearray]:
    """Damage a file in one way.

    Args:
        whole: What was in it.
        other: What is in a file of another kind.
        source: Of the way and the place.
        ends: Flips and zeros fall within so many bytes of its ends, as in the middle of a large
            file without checksums there are numbers alone, of which any will do.
    """
    content, way = bytearray(whole), source.choice(WAYS)

    def place() -> int:
        near = source.randrange(min(ends, len(whole)))
        return source.choice((near, len(whole) - 1 - near))

    if way == "flipped":
        for _ in range(source.randint(1, 4)):
            content[place()] ^= 1 << source.randrange(8)
    elif way == "cut off":
        del content[source.randrange(len(whole)) :]
    elif way == "longer":
        content += source.randbytes(source.randint(1, 99))
    elif way == "shorter inside":
        start = source.randrange(len(whole))
        del content[start : start + source.randint(1, 99)]
    elif way == "zeroed":
        start = place()
        size = len(content[start : start + 512])
        content[start : start + size] = bytes(size)
    else:
        content[:] = other
    return way, content


def outcomes(
    file: Path,
    read: Callable[[], Any],
    judge: Callable[[Any], str],
    other: bytes,
    count: int,
    ends: int = 1 << 62,
) -> Counter[str]:
    """Damage a file again and again, read it, and count what came of it.

    Args:
        file: Whole at first, and at the end.
        read: Reads it.
        judge: Says what was read: "the same", or something else that may be.
        other: As in `damaged`.
        count: How often.
        ends: As in `damaged`.

    Returns:
        How often it was "refused" by a DataError that names it, and how often each judgement came.
    """
    whole, source, found = file.read_bytes(), random.Random(0), Counter[str]()
    for content in _others(whole, other, source, count, ends):
        file.write_bytes(content)
        try:
            found[judge(read())] += 1
        except DataError as error:
            assert str(file) in str(error)  # noqa: PT017
            found["refused"] += 1
    file.write_bytes(whole)
    assert judge(read()) == "the same"
    return found


def _others(
    whole: bytes, other: bytes, source: random.Random, count: int, ends: int
) -> Iterator[bytearray]:
    """Yield so many damaged contents, each other than the whole one."""
    while count:
        _, content = damaged(whole, other, source, ends)
        if content != whole:  # zeros over zeros
            count -= 1
            yield content
