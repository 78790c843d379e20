"""report: what a study leaves behind, tables and JSON, each file whole or not there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import fastres
from fastres.files import write
from fastres.formats import DataError
from fastres.ops import native

Row = TypeVar("Row")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def digest(content: Any) -> str:
    """Hash what JSON can hold as JSON has it, so that a damaged digit is seen."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finished(path: Path, arguments: Mapping[str, Any], parse: Callable[[Any], Row]) -> list[Row]:
    """Read back the rows of an earlier run with the same arguments.

    Args:
        path: Its report.json.
        arguments: All that decides the result.
        parse: Makes a row of what JSON holds; KeyError, TypeError or ValueError where it is none.

    Returns:
        The rows; none where there is no such run.

    Raises:
        DataError: If the file is damaged, or something else.
    """
    try:
        content = json.loads(path.read_text())
        made_for, rows = content["arguments"], content["rows"]
        if content["sha256"] != digest([made_for, rows]):
            raise ValueError("other arguments or rows than it was written with")
        if made_for != arguments:
            return []
        return [parse(row) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: not JSON
        found = f"{type(error).__name__}: {error}"
        raise DataError(path, "must be a report as it was written", found) from error


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write(path, text.getvalue())


def prepare_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to, before work is spent on what goes there.

    Raises:
        OSError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror
        raise OSError(f"report: out must be a writable folder, got {folder}: {reason}") from None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal: columns as wide as they must be, right-aligned."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a result was made with: versions, device, threads, native libraries, date."""
    return {
        "fastres": fastres.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "native": {name: name not in native.missing for name in ("_C", "_C_cuda")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Name a device as its maker does, such as 'NVIDIA H200'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
