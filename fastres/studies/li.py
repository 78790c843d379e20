"""li: shortcut depth and the Hessian, at the start and on the way (Li et al. 2016)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import fastres
from fastres import plots
from fastres.data import read
from fastres.studies.li_claims import summary, text
from fastres.studies.li_data import Task, task
from fastres.studies.li_pieces import Options, Study, pieces
from fastres.studies.li_plots import figure
from fastres.studies.li_report import Part, rows_of
from fastres.studies.resuming import Form, Result, measure_all
from fastres.threads import threads


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
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
    plan = {piece.name: piece for piece in pieces(options)}

    def measure(name: str, parts: Sequence[Part]) -> Part:
        return Part(name, tuple(plan[name].rows(study, options, rows_of(parts))))

    with threads(1):  # the matrices are small: a second thread waits for the first
        return measure_all(
            FORM, list(plan), measure, _arguments(options, study), options.out, options.fresh, say
        )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    plots.save(figure(rows_of(parts)), out / "li.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


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
