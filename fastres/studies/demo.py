"""demo: the perturbation of identity that residual MLPs of 6 to 300 blocks learn (Hauser 2019)."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

import fastres
from fastres.data import Data, load
from fastres.nn import ResidualMLP
from fastres.record import Tape, record
from fastres.studies.demo_report import Row, draw, summary, text
from fastres.studies.resuming import Form, Result, measure_all
from fastres.threads import threads
from fastres.training import Recipe, Stepper, evaluate, evaluating, train

# what all six depths together do in about a minute on two cores
EPOCHS: Final[Mapping[str, int]] = {"digits": 12, "mnist": 1, "cifar10": 2}


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data: str = "digits"
    data_root: str | None = None
    blocks: tuple[int, ...] = (6, 12, 30, 60, 120, 300)
    width: int = 64
    epochs: int | None = None  # None: as many as EPOCHS says
    seed: int = 0
    out: Path = Path("fastres-report")
    device: str = "cpu"
    threads: int = 1  # the matrices are small: two threads gain nothing, and lose on a busy machine
    fresh: bool = False  # do not take over depths that an earlier run has finished

    def __post_init__(self) -> None:
        epochs = 0 if self.epochs is None else self.epochs
        least, most = min(self.blocks, default=0), max(self.blocks, default=0)
        for name, value, low, high in (
            ("blocks", least, 1, 1 << 16),
            ("blocks", most, 1, 1 << 16),
            ("width", self.width, 1, 1 << 16),
            ("epochs", epochs, 0, 1 << 20),
            ("seed", self.seed, 0, (1 << 64) - 1),  # what a generator of torch takes
            ("threads", self.threads, 1, 1 << 10),  # a runtime that can start no more ends all
        ):
            if value < low:
                raise ValueError(f"demo: {name} must be >= {low}, got {value}")
            if value > high:
                raise ValueError(f"demo: {name} must be <= {high}, got {value}")


def run(options: Options, say: Callable[[str], None] = print) -> Result[Row]:
    """Train and measure every depth; write the report after each.

    Ctrl-C ends it early and leaves a whole report of the depths that are finished; the same
    options again go on from there.

    Args:
        options: What to run.
        say: Takes each line of text for the user.

    Returns:
        What was measured.

    Raises:
        ValueError: If an option or a data file is wrong.
        OSError: If a file is missing or the output folder cannot be written to.
        FloatingPointError: If a training diverges.
    """
    device = _device(options.device)
    data = load(options.data, options.data_root)
    with threads(options.threads):
        return measure_all(
            FORM,
            sorted(set(options.blocks)),
            lambda blocks, _: measure(blocks, options, data, device),
            _arguments(options, data),
            options.out,
            options.fresh,
            say,
            "depths",
            device,
            with_bar=False,
        )


FORM: Final = Form(Row.parse, summary, list, text, draw)


def measure(blocks: int, options: Options, data: Data, device: torch.device) -> Row:
    """Train one depth, measure it on the test set in eval mode, and time what recording costs."""
    model = _model(blocks, options, data, device)
    recipe = _recipe(options, blocks)
    x, y = data.test_x.to(device), data.test_y.to(device)
    start = recorded(model, x)
    history = train(
        model, data, recipe, seed=options.seed, device=device, progress=f"{blocks:4} blocks"
    )
    tape = recorded(model, x)
    return Row(
        blocks=blocks,
        error=evaluate(model, x, y),
        absolute=tape.mean_absolute,
        scaled=tape.mean_scaled,
        scaled_start=start.mean_scaled,
        record_cost=recording_cost(model, data, recipe, device),
        seconds=history.seconds,
        profile_absolute=tape.absolute.tolist(),
        profile_scaled=tape.scaled.tolist(),
    )


def _model(blocks: int, options: Options, data: Data, device: torch.device) -> ResidualMLP:
    try:
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
            torch.manual_seed(options.seed)
            return ResidualMLP(data.features, data.classes, options.width, blocks).to(device)
    except RuntimeError as error:  # of the allocator
        reason = _first_line(error)
        found = f"{blocks} blocks of width {options.width}: {reason}"
        raise ValueError(f"demo: blocks and width must fit into memory, got {found}") from error


def recorded(model: torch.nn.Module, x: torch.Tensor) -> Tape:
    """Record a model in eval mode on x [N, ...], in parts that bound the memory."""
    with torch.no_grad(), evaluating(model), record(model) as tape:
        for start in range(0, len(x), 2048):
            model(x[start : start + 2048])
    return tape


def recording_cost(
    model: torch.nn.Module, data: Data, recipe: Recipe, device: torch.device
) -> float:
    """Time recorded over plain training steps: two copies, one batch, A B A B, medians.

    A step is forward, backward and update. At least 9 pairs, then more for 2 seconds, at most 100.
    """
    x = data.train_x[: recipe.batch_size].to(device)
    y = data.train_y[: recipe.batch_size].to(device)
    plain, recorded = copy.deepcopy(model), copy.deepcopy(model)
    times: dict[str, list[float]] = {"plain": [], "recorded": []}
    steps = {
        name: Stepper(m, recipe, 200) for name, m in zip(times, (plain, recorded), strict=True)
    }
    with record(recorded):
        start = time.perf_counter()
        while len(times["plain"]) < 11 or (
            time.perf_counter() - start < 2 and len(times["plain"]) < 102
        ):
            for name, step in steps.items():
                begin = time.perf_counter()
                step(x, y)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[name].append(time.perf_counter() - begin)
    medians = [statistics.median(series[2:]) for series in times.values()]  # 2 to warm up
    return medians[1] / medians[0]


def _recipe(options: Options, blocks: int) -> Recipe:
    # Where branches scale by 1 / sqrt(L), so does the best rate of Adam (Yang et al. 2023,
    # arXiv 2310.02244): with 3e-3 at every depth 300 blocks end at 6 to 10 % error, not 2 to 3 %.
    epochs = EPOCHS[options.data] if options.epochs is None else options.epochs
    return Recipe(epochs=epochs, lr=7.5e-3 / math.sqrt(blocks))


def _device(name: str) -> torch.device:
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:  # it differs by device
        reason = _first_line(error)
        raise ValueError(f"demo: device must be usable, got {name!r}: {reason}") from None
    if device.type == "meta":
        raise ValueError(f"demo: device must hold values, got {name!r}")
    return device


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _arguments(options: Options, data: Data) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished depths."""
    return {
        "study": "demo",
        "data": options.data,
        "samples": [len(data.train_x), len(data.test_x)],
        "checksum": data.checksum(),  # Fashion-MNIST, say, has the names and counts of MNIST
        "width": options.width,
        "recipe at 1 block": asdict(_recipe(options, 1)),
        "seed": options.seed,
        "device": options.device,
        "threads": options.threads,
        "versions": [fastres.__version__, torch.__version__],
    }
