"""sizes: the errors of sizes that modules are given."""

from __future__ import annotations


def check_size(where: str, name: str, value: int, least: int) -> None:
    """Raise the error that names a size, if it is wrong.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is less than the least.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{where}: {name} must be >= {least}, got {value}")
