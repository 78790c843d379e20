"""forward: one forward pass of a model with marked branches, and its ordinary gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastres.paths.chunks import Chunk, Roots, backward
from fastres.paths.counts import Choice, choices
from fastres.paths.graph import cuts
from fastres.paths.marks import Loss, Marks
from fastres.sites import Watch
from fastres.versions import tensors_in


@dataclass
class Forward:
    """A pass that has ended, with its graph.

    Attributes:
        marks: The marks on the branches.
        loss: The loss, a scalar.
        where: What is differentiated by.
        start: Site at whose block that is; None for the model's input or embedding.
        gradient: The ordinary gradient there, [B, ...].
        between: The counted sites between where and the loss, in the order in which they ran.
    """

    marks: Marks
    loss: Tensor
    where: GradientEdge
    start: int | None
    gradient: Tensor
    between: list[int]

    @property
    def choices(self) -> list[Choice]:
        """The choices that a path from the loss to where has."""
        return choices([site.level for site in self.marks.sites], self.between, self.start)

    @cached_property
    def cuts(self) -> frozenset[int]:
        """The counted sites through whose sum every path goes."""
        (loss, _), *_ = self.roots
        found, blocks = cuts(loss, self.where), self.marks.blocks
        return frozenset(site for site in self.between if blocks[site].total.node in found)

    @property
    def roots(self) -> Roots:
        """Where every backward pass begins."""
        return [(get_gradient_edge(self.loss), torch.ones_like(self.loss))]

    def ordinary(
        self, scale: float = 1.0, signs: Sequence[int] | None = None
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Run an ordinary backward pass, of a multiple of the loss, with signs for the branches.

        Returns:
            The gradient, None where the loss does not depend on it; and, for each counted site
            between, the cotangent of its sum.
        """
        chunk = Chunk([True], [0], signs=signs)
        roots = [(edge, scale * g) for edge, g in self.roots]
        (rows,) = backward(self.marks, chunk, roots, [self.where])
        arrived = {site: held.row for site, held in chunk.last.items()}
        return None if rows is None else rows[0], arrived


@contextmanager
def forward(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    where: str,
    sites: Sequence[str] | None,
) -> Iterator[Forward]:
    """Run a model once and differentiate the loss; the graph lives as long as the `with` block.

    Buffers, such as the running statistics of batch norm, stay as they are, and so do all `.grad`.

    Args:
        model: Any module.
        inputs: What it is called with: a tensor, a sequence of arguments, or a mapping by name.
        loss: Maps the output of the model to a scalar.
        where: "input", "embedding" or the name of a site.
        sites: Names of the sites to count; None for all.
    """
    with torch.inference_mode(False), torch.enable_grad():
        marks = Marks(type(model).__name__)
        args, kwargs, leaf = _arguments(inputs, where)
        with Watch("path_gradients", model, marks), _first_embedding(model) as embedding:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            out = torch.func.functional_call(model, buffers, args, kwargs)
        if not marks.sites:
            raise TypeError(
                "path_gradients: model must run through torch.nn.Module.__call__, "
                f"got {type(model).__name__}, which overrides it"
            )
        try:
            start, edge = _place(marks, where, leaf, embedding)
            yield _differentiate(marks, _scalar(loss, out), where, start, edge, sites)
        finally:
            marks.clear()


def _arguments(inputs: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return the arguments of the model, and the leaf that its first floating tensor comes from."""
    if isinstance(inputs, Tensor):
        args: tuple[Any, ...] = (inputs,)
        kwargs: dict[str, Any] = {}
    elif isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        args, kwargs = tuple(inputs), {}
    else:
        raise TypeError(
            "path_gradients: inputs must be a tensor, a sequence or a mapping of arguments, "
            f"got {type(inputs).__name__}"
        )
    values = [*args, *kwargs.values()]
    place = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point()]
    if where != "input":
        return args, kwargs, None
    if not place:
        kinds = [str(t.dtype) for t in tensors_in(values)]
        raise ValueError(
            "path_gradients: where must be 'embedding' or a site for inputs that cannot have a "
            f"gradient, got 'input' with inputs {kinds}"
        )
    leaf = values[place[0]].detach().clone().requires_grad_()
    values[place[0]] = leaf.clone()  # a model may change its input in place, but not a leaf
    args, rest = tuple(values[: len(args)]), values[len(args) :]
    return args, dict(zip(kwargs, rest, strict=True)), leaf


@contextmanager
def _first_embedding(model: nn.Module) -> Iterator[list[GradientEdge]]:
    """Note where the output of the first nn.Embedding that runs is in the graph."""
    found: list[GradientEdge] = []

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        if not found:
            with torch._C.DisableTorchFunction():  # the search must not take it for the model's
                found.append(get_gradient_edge(out if out.requires_grad else out.requires_grad_()))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _place(
    marks: Marks, where: str, leaf: Tensor | None, embedding: list[GradientEdge]
) -> tuple[int | None, GradientEdge]:
    """Find what is differentiated by, and at which site that is."""
    names = [site.name for site in marks.sites]
    if leaf is not None:
        return None, get_gradient_edge(leaf)
    if where in names:
        return names.index(where), marks.stream(names.index(where))
    if where != "embedding":
        known = ", ".join(map(repr, names))
        raise ValueError(
            "path_gradients: where must be 'input', 'embedding' or the name of a site, "
            f"got {where!r}, with sites {known}"
        )
    if not embedding:
        raise ValueError(
            "path_gradients: where must be 'input' or a site for a model that runs no "
            "torch.nn.Embedding, got 'embedding'"
        )
    return None, embedding[0]


def _scalar(loss: Loss, out: Any) -> Tensor:
    value = loss(out)
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"path_gradients: loss must return a scalar tensor, got {kind}")
    if value.dim() > 0:
        shape = list(value.shape)
        raise ValueError(f"path_gradients: loss must return a scalar tensor, got shape {shape}")
    if not value.requires_grad:
        raise ValueError(
            "path_gradients: loss must depend on the inputs or the weights by differentiable "
            "steps, got a value without a gradient"
        )
    return value


def _differentiate(
    marks: Marks,
    loss: Tensor,
    where: str,
    start: int | None,
    edge: GradientEdge,
    sites: Sequence[str] | None,
) -> Forward:
    """Run the ordinary backward pass: it shows which sites lie between the loss and where."""
    names = [site.name for site in marks.sites]
    for name in sites or ():
        if name not in names:
            known = ", ".join(map(repr, names))
            raise ValueError(
                f"path_gradients: sites must be names of sites, got {name!r} of {known}"
            )
    marks.chosen = {i for i, name in enumerate(names) if sites is None or name in sites}
    made = Forward(marks, loss, edge, start, gradient=loss.detach(), between=[])
    found, arrived = made.ordinary()
    if found is None:
        raise ValueError(
            "path_gradients: where must reach the loss through differentiable steps, "
            f"got {where!r}, which has no gradient"
        )
    return replace(made, gradient=found, between=sorted(arrived))
