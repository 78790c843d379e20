"""tracking: the curvature of any model on the way: eigenvalues, trace and index of every block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastres.analysis.conditioning.lanczos import Operator, lanczos
from fastres.analysis.conditioning.operators import SymmetricOperator, import_curvlinops
from fastres.nn.initialisations import Branched
from fastres.sites import trace

if TYPE_CHECKING:
    import pandas

_LOSSES = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)  # what curvlinops knows
WHOLE = "whole model"  # all parameters together; no attribute of a module has a space


@dataclass(frozen=True)
class Curvature:
    """The Hessian of one block at one moment, as Lanczos sees it."""

    step: int
    block: str  # or "whole model", for all parameters
    parameters: int
    largest: float  # eigenvalue
    smallest: float
    trace: float
    trace_error: float  # standard error; nan for one draw
    index: float  # the fraction of eigenvalues below zero
    index_error: float


class Restricted(SymmetricOperator):
    """The rows and columns of an operator that some of its coordinates have.

    Args:
        operator: Symmetric, [P, P].
        chosen: Coordinates, [Q] int64.
    """

    def __init__(self, operator: Operator, chosen: Tensor) -> None:
        super().__init__(len(chosen), operator.dtype, operator.device)
        self._operator, self._chosen = operator, chosen.to(operator.device)

    def products(self, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, Q]: [K, Q]."""
        full = vectors.new_zeros(self._operator.shape[1], len(vectors))
        full[self._chosen] = vectors.mT
        found: Tensor = self._operator @ full
        return found[self._chosen].mT


def model_hessian(
    model: nn.Module, loss: nn.Module, data: Sequence[tuple[Any, Tensor]]
) -> Operator:
    """Make the Hessian of a model's mean loss over data, by all trained parameters.

    It is curvlinops' HessianLinearOperator: forward over reverse by torch.func, batch by batch.

    Args:
        model: Any module that torch.func can differentiate; batch norm in eval mode.
        loss: nn.MSELoss, nn.CrossEntropyLoss or nn.BCEWithLogitsLoss.
        data: Batches of inputs and targets, the same in every pass.

    Raises:
        ModuleNotFoundError: Without curvlinops.
        TypeError: If the loss is none of these.
        ValueError: If the model has no trained parameters, shares one between modules, or has batch
            norm in train mode; or if there are no data.
    """
    curvlinops = import_curvlinops("model_hessian")
    if type(loss) not in _LOSSES:
        known, kind = ", ".join(each.__name__ for each in _LOSSES), type(loss).__name__
        raise TypeError(f"model_hessian: loss must be one of {known}, got {kind}")
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training:
            raise ValueError(f"model_hessian: batch norm must be in eval mode, got {name} in train")
    named = [*model.named_parameters(remove_duplicate=False)]
    if len(named) > len({id(p) for _, p in named}):
        raise ValueError("model_hessian: model must not share parameters between its modules")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model_hessian: model must have trained parameters, got none")
    if not data:
        raise ValueError("model_hessian: data must have at least one batch, got none")
    made: Operator = curvlinops.HessianLinearOperator(model, loss, parameters, list(data))
    return made


def blocks_of(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Find the parameters of each residual block, as coordinates among all trained ones.

    A block is the module whose forward contains residual adds, by its name, with all parameters in
    it; of a stack of fastres.nn each block by itself. A model whose own forward has the adds
    has one block that is all of it.

    Args:
        model: Any module.
        inputs: What it is called with, once, to find its sites.

    Returns:
        Name of a block -> coordinates, [Q] int64, in the flattened order of `model_hessian`; blocks
        without trained parameters are left out.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for site in trace(model, *inputs):
        match = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", site.name)
        assert match is not None
        owner = match[1] if match[1] in modules else ""
        part = modules[owner]
        slices = isinstance(part, Branched) and match[2] is not None
        name = site.name if slices else match[1]
        if name not in found:
            found[name] = _coordinates(model, part, int(match[2]) if slices else None)
    return {name: chosen for name, chosen in found.items() if len(chosen)}


def _coordinates(model: nn.Module, part: nn.Module, block: int | None) -> Tensor:
    """List the coordinates of a module's parameters, or of one block of each."""
    own, first, chosen = {id(p) for p in part.parameters()}, 0, []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in own:
            all_of_it = torch.arange(first, first + parameter.numel()).view(parameter.shape)
            chosen.append((all_of_it if block is None else all_of_it[block]).flatten())
        first += parameter.numel()
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)


class CurvatureTracker:
    """Measures the Hessian of an operator, and of its blocks, whenever it is asked to.

    Args:
        operator: Of a Hessian that reads the parameters as they are in each product, as that of
            `model_hessian` does.
        blocks: Coordinates by name, such as those of `blocks_of`; None: all parameters only.
        steps: Lanczos steps; each is one product with all draws, for each block.
        draws: Random vectors.
        seed: Of these: the same at every moment, so that what changes is the Hessian.

    Attributes:
        rows: What was measured, in order.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> data = [(torch.ones(4, 3), torch.zeros(4, 1))]
        >>> tracker = CurvatureTracker(model_hessian(model, nn.MSELoss(), data))
        >>> round(tracker.look(step=0)[0].largest, 3)  # of 2 E[(x, 1) (x, 1)^T]
        8.0
    """

    def __init__(
        self,
        operator: Operator,
        blocks: Mapping[str, Tensor] | None = None,
        *,
        steps: int = 20,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        size = operator.shape[0]
        for name, value in (("steps", steps), ("draws", draws)):
            if value < 1:
                raise ValueError(f"CurvatureTracker: {name} must be >= 1, got {value}")
        for name, chosen in (blocks or {}).items():
            if name == WHOLE:
                raise ValueError(
                    f"CurvatureTracker: blocks must not have the name {WHOLE!r}, which is that of "
                    "all parameters"
                )
            if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= size:
                raise ValueError(
                    f"CurvatureTracker: blocks[{name!r}] must be coordinates 0 to {size - 1}, at "
                    f"least one, got {len(chosen)}"
                )
        self.rows: list[Curvature] = []
        self._operators = {WHOLE: operator} | {
            name: Restricted(operator, chosen) for name, chosen in (blocks or {}).items()
        }
        self._steps, self._draws, self._seed = steps, draws, seed

    def look(self, step: int) -> list[Curvature]:
        """Measure the model and its blocks as they are now.

        Args:
            step: What the rows call this moment.

        Returns:
            The new rows, that of the whole model first.
        """
        new = []
        for name, operator in self._operators.items():
            found = lanczos(operator, self._steps, self._draws, self._seed)
            new.append(
                Curvature(
                    step=step,
                    block=name,
                    parameters=operator.shape[0],
                    largest=found.largest,
                    smallest=found.smallest,
                    trace=found.trace,
                    trace_error=found.trace_error,
                    index=found.index,
                    index_error=found.index_error,
                )
            )
        self.rows += new
        return new

    def to_frame(self) -> pandas.DataFrame:
        """Make a pandas DataFrame of the rows.

        Raises:
            ModuleNotFoundError: Without pandas.
        """
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])
