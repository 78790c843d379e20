"""li: shortcut depth and the Hessian, at the start and on the way (Li et al. 2016)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastres
from fastres import plots, report
from fastres.data import read
from fastres.progress import bar
from fastres.studies.li_claims import claims_of, text
from fastres.studies.li_data import Task, task
from fastres.studies.li_pieces import Options, Study, pieces
from fastres.studies.li_plots import figure
from fastres.studies.li_report import Part, finished, save
from fastres.threads import threads


@dataclass(frozen=True)
class Result:
    """The parts that are done, and whether Ctrl-C ended it."""

    parts: tuple[Part, ...]
    interrupted: bool


def run(options: Options, say: Callable[[str], None] = print) -> Result:
    """Train all networks, look at their Hessians, and write the report after each part.

    Ctrl-C ends it early and leaves a whole report of the parts that are finished; the same options
    again go on from there.

    Args:
        options: What to run.
        say: Takes each line of text for the user.

    Returns:
        What was measured.

    Raises:
        ValueError: If an option or a data file is wrong.
        OSError: If a file is missing or the output folder cannot be written to.
    """
    study = prepare(options)
    report.prepare_folder(options.out)
    arguments = _arguments(options, study)
    parts = [] if options.fresh else finished(options.out / "report.json", arguments)
    if parts:
        say(f"finished before, in {options.out}: {len(parts)} parts (--fresh starts over)")
    known = {part.name for part in parts}
    work = [piece for piece in pieces(options) if piece.name not in known]
    interrupted = False
    try:
        with bar("parts" if work else None, len(work), unit="part") as shown:
            for piece in work:
                rows = [row for part in parts for row in part.rows]
                with threads(1):  # the matrices are small: a second thread waits for the first
                    parts.append(Part(piece.name, tuple(piece.rows(study, options, rows))))
                _save(options.out, arguments, parts)
                shown.update(1)
    except KeyboardInterrupt:
        interrupted = True
    if parts:
        _save(options.out, arguments, parts)  # claims by this version, also where no part was left
        _present(parts, options.out, say)
    return Result(tuple(parts), interrupted)


def _save(out: Path, arguments: dict[str, Any], parts: list[Part]) -> None:
    rows = [row for part in parts for row in part.rows]
    environment = report.environment(torch.device("cpu"))
    save(out, arguments, environment, parts, claims_of(rows))


def _present(parts: list[Part], out: Path, say: Callable[[str], None]) -> None:
    rows = [row for part in parts for row in part.rows]
    say(f"\n{text(claims_of(rows))}\n")
    try:
        plots.save(figure(rows), out / "li.png")
    except ModuleNotFoundError as error:
        say(str(error))
    say(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def prepare(options: Options) -> Study:
    """Read the MNIST test images and reduce them to 10 whitened components.

    A linear network sees of its data no more than their moments, so it gets ten samples that have
    the moments of all, and its loss is what it lacks to the best linear map. Networks with relu
    get images.
    """
    images, labels = read("mnist", options.data_root)[1]
    whole = task(images, labels)
    some = task(images[: options.samples], labels[: options.samples])
    crc = 0
    for tensor in (whole.x, whole.y, some.x):
        crc = zlib.crc32(np.round(tensor.abs().numpy(), 4).data, crc)
    small = Task(some.x.float(), some.y.float())
    least = {"linear": whole.least, "relu": some.least}
    return Study({"linear": whole.condensed(), "relu": small}, least, f"{crc:08x}")


def _arguments(options: Options, study: Study) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished parts."""
    return {
        "study": "li",
        "data": "MNIST test images, 10 whitened principal components, one-hot targets",
        "training": f"full-batch gradient descent, {options.epochs} epochs",
        "depths": list(options.depths),
        "relu_depths": list(options.relu_depths),
        "hessian_depths": list(options.hessian_depths),
        "course_depths": list(options.course_depths),
        "rates": options.grid,
        "seeds": options.seeds,
        "samples": options.samples,
        "checksum": study.checksum,
        "versions": [fastres.__version__, torch.__version__],
    }
