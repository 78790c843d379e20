"""resuming: a study part by part, a report after each; what was finished before is taken over."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastres import report
from fastres.files import alone_in
from fastres.formats import DataError
from fastres.progress import bar


class Keyed(Protocol):
    """A dataclass that JSON can hold: what is measured as one, and taken over as one."""

    @property
    def key(self) -> Hashable:
        """Names the part among those of its study."""


Part = TypeVar("Part", bound=Keyed)
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Form(Generic[Part]):
    """How the parts of a study become files and text."""

    parse: Callable[[Any], Part]  # of JSON; KeyError, TypeError or ValueError where it is not one
    summary: Callable[[Sequence[Part]], dict[str, Any]]  # what report.json says beside the parts
    rows: Callable[[Sequence[Part]], Sequence[Any]]  # dataclasses, the lines of table.csv
    text: Callable[[Sequence[Part]], str]
    draw: Callable[[Path, Sequence[Part]], None]  # ModuleNotFoundError where matplotlib is missing


@dataclass(frozen=True)
class Result(Generic[Part]):
    """The parts that are measured, and whether Ctrl-C ended it."""

    parts: tuple[Part, ...]
    interrupted: bool


def measure_all(
    form: Form[Part],
    plan: Sequence[Key],
    measure: Callable[[Key, Sequence[Part]], Part],
    arguments: Mapping[str, Any],
    out: Path,
    fresh: bool,
    say: Callable[[str], None],
    units: str = "parts",
    device: torch.device | None = None,
    with_bar: bool = True,
) -> Result[Part]:
    """Measure part after part, and write the report after each.

    Ctrl-C ends it early and leaves a whole report of the parts that are finished; the same
    arguments again go on from there.

    Args:
        form: How parts become files and text.
        plan: The keys of all parts, in the order in which they are measured and written.
        measure: Makes the part of a key; it is given those that are there already.
        arguments: All that decides the result: equal ones may share finished parts.
        out: The folder that is written to.
        fresh: Whether parts of an earlier run are measured again.
        say: Takes each line of text for the user.
        units: What parts are called.
        device: What is measured on; None: the CPU.
        with_bar: Whether there is a progress bar; False where `measure` has its own.

    Returns:
        What was measured, in the order of the plan.

    Raises:
        OSError: If the output folder cannot be written to.
        ValueError: If another run is at work in it.
    """
    report.prepare_folder(out)
    with alone_in(out):
        before = [] if fresh else _finished(form, out, arguments, say)
        parts: dict[Hashable, Part] = {part.key: part for part in before if part.key in plan}
        if parts:
            counts = f"{len(parts)} of {len(plan)} {units}"
            say(f"finished before, in {out}: {counts} (--fresh starts over)")
        left = [key for key in plan if key not in parts]
        interrupted = False
        try:
            with bar(units if left and with_bar else None, len(left)) as shown:
                for key in left:
                    parts[key] = measure(key, list(parts.values()))
                    environment = report.environment(device or torch.device("cpu"))
                    _save(form, out, arguments, environment, [parts[k] for k in plan if k in parts])
                    shown.update(1)
        except KeyboardInterrupt:
            interrupted = True
        done = tuple(parts[key] for key in plan if key in parts)
        if done:
            _present(form, out, done, say)
    return Result(done, interrupted)


def _finished(
    form: Form[Part], out: Path, arguments: Mapping[str, Any], say: Callable[[str], None]
) -> list[Part]:
    """Read back the parts of an earlier run; a damaged report is put aside, not written over."""
    file = out / "report.json"
    try:
        return report.finished(file, arguments, form.parse)
    except DataError as error:
        aside = file.replace(out / "report.damaged.json")
        say(f"{error}; it is now {aside.name}, and this run starts over")
        return []


def _save(
    form: Form[Part],
    out: Path,
    arguments: Mapping[str, Any],
    environment: Mapping[str, Any],
    parts: Sequence[Part],
) -> None:
    """Write table.csv, rows without their lists, and report.json, from which a run can go on."""
    rows = form.rows(parts)
    names = [f.name for f in fields(rows[0])] if rows else []
    columns = [name for name in names if not isinstance(getattr(rows[0], name), list)]
    lines = [[getattr(row, name) for name in columns] for row in rows]
    report.write_csv(out / "table.csv", columns, lines)
    entries: list[Any] = [asdict(part) for part in parts]  # type: ignore[call-overload]
    content = {"arguments": arguments, "environment": environment, **form.summary(parts)}
    content |= {"sha256": report.digest([arguments, entries]), "rows": entries}
    report.write_json(out / "report.json", content)  # last: what it has is in the table


def _present(
    form: Form[Part], out: Path, parts: Sequence[Part], say: Callable[[str], None]
) -> None:
    say(f"\n{form.text(parts)}\n")
    try:
        form.draw(out, parts)
    except ModuleNotFoundError as error:
        say(str(error))
    say(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
