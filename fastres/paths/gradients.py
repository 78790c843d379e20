"""gradients: the gradient of any residual network, separated exactly by the length of its paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.autograd.graph import get_gradient_edge

from fastres.paths.counts import path_counts
from fastres.paths.forward import forward
from fastres.paths.graph import mixes_samples
from fastres.paths.marks import Loss
from fastres.paths.measures import Method
from fastres.paths.methods import METHODS, Task
from fastres.paths.result import PathGradients


def path_gradients(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    max_length: int | None = None,
    where: str = "input",
    method: Method = "exact",
    sites: Sequence[str] | None = None,
    chunk: int | None = None,
    *,
    by: Literal["length", "block"] = "length",
    draws: int = 64,
    seed: int = 0,
    keep: bool = False,
    progress: str | None = None,
) -> PathGradients:
    """Separate the gradient of a network by the number of branches that its paths go through.

    Unravelled, L residual blocks are 2^L paths, each through the branch or past it (Veit, Wilber,
    Belongie 2016, arXiv 1605.06431). G_k is the gradient summed over all paths of k branches. The
    methods answer three questions and a cheaper one:

    - "exact": what do the paths of length k contribute *together*? Every G_k, with its norm and its
      signed share <G_k, g> / <g, g> of the ordinary gradient g. Up to K + 2 backward passes' work.
    - "moments": what are mean and variance of the length, weighed by those shares? The same numbers
      as "exact" without a limit of length, from three cotangents instead of L + 1.
    - "energy": how much do the single paths carry, *before* they cancel? The sum of ||g_path||^2
      over all paths of length k, estimated without bias from random signs, all paths at once.
    - "sampled": what does the paper plot? The mean of ||g_path|| over random paths of length k, and
      their number times that. It is not ||G_k||: paths cancel.

    The model runs once, in its present mode; weights, buffers and `.grad` stay as they are. Batch
    norm may be in train mode: then the gradient is that of the whole batch, and single samples are
    refused. A site inside the branch of another adds to the length of what goes through both.

    Args:
        model: Any module that `fastres.record` takes.
        inputs: A tensor, a sequence of arguments, or a mapping of arguments by name.
        loss: Maps the model's output to a scalar.
        max_length: K, the longest length kept apart; what is longer is in the tail, exactly. None
            for all.
        where: What to differentiate by: "input" (the first floating tensor), "embedding" (the
            output of the first torch.nn.Embedding that runs), or the name of a site, for the stream
            that enters its block. Only sites after it count.
        method: exact, moments, energy or sampled.
        sites: Names of the sites to count; None for all. The others count as no branch.
        chunk: How many lengths to compute in one backward pass; None chooses. No result depends on
            it, but for rounding.
        by: "block" also measures, for method "exact", what goes through each branch and the norms
            of the gradients by its weights. Lengths beyond the range of the type are then zero.
        draws: How many random signs ("energy") or paths per length ("sampled") to average over.
        seed: Of these.
        keep: Whether to keep the G_k themselves, [K+1, B, ...].
        progress: Label of a progress bar on stderr; None for no bar.

    Returns:
        What was measured.

    Raises:
        TypeError: If an argument has the wrong type, or the model is compiled or scripted.
        ValueError: If the loss is not a scalar; the model has no site; the loss does not depend on
            what is differentiated by; an argument is out of range or names no site.
        RuntimeError: If the loss frees its own graph.

    Warns:
        UserWarning: If the lengths do not add up to the ordinary gradient, to 1e-4 of it in
            float32, with the cause that was found; or if an operator has no batching rule, so that
            they are computed one at a time.

    Example:
        >>> import torch
        >>> from fastres.nn import ResidualMLP
        >>> model = ResidualMLP(in_features=4, classes=2, width=8, blocks=3)
        >>> paths = path_gradients(model, torch.ones(5, 4), lambda y: y[:, 0].sum())
        >>> paths.paths, paths.norms.shape, round(paths.shares.sum().item(), 5)
        ((1, 3, 3, 1), torch.Size([4]), 1.0)
    """
    _check(max_length, method, sites, by, chunk, draws, keep)
    with forward(model, inputs, loss, where, sites) as done:
        blocks = len(done.between)
        longest = blocks if max_length is None else max_length
        if longest > blocks:
            raise ValueError(
                f"path_gradients: max_length must be at most the {blocks} counted sites between "
                f"{where!r} and the loss, got {max_length}"
            )
        counts = path_counts(done.choices)
        task = Task(done, longest, counts, chunk, by == "block", draws, seed, keep, progress)
        measured, error = METHODS[method](task)
        return PathGradients(
            method=method,
            where=where,
            sites=tuple(done.marks.sites[site].name for site in done.between),
            paths=tuple(counts[: longest + 1]),
            gradient=done.gradient.detach(),
            sum_error=error,
            mixes_samples=mixes_samples(get_gradient_edge(done.loss)),
            measured=measured,
        )


def _check(
    max_length: int | None,
    method: str,
    sites: Sequence[str] | None,
    by: str,
    chunk: int | None,
    draws: int,
    keep: bool,
) -> None:
    """Check the arguments that need no model."""
    for name, value, known in (("method", method, tuple(METHODS)), ("by", by, ("length", "block"))):
        if value not in known:
            options = ", ".join(known)
            raise ValueError(f"path_gradients: {name} must be one of {options}, got {value!r}")
    if method != "exact":
        given: dict[str, tuple[object, object]] = {"by": (by, "length"), "keep": (keep, False)}
        for name, (got, rule) in given.items():
            if got != rule:
                raise ValueError(
                    f"path_gradients: {name} must be {rule!r} for method {method!r}, got {got!r}"
                )
    if isinstance(sites, str):
        raise TypeError(f"path_gradients: sites must be a sequence of names, got {sites!r}")
    if sites is not None and not sites:
        raise ValueError("path_gradients: sites must name at least one site, got none")
    for name, number, least in (
        ("max_length", max_length, 0),
        ("chunk", chunk, 1),
        ("draws", draws, 1),
    ):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"path_gradients: {name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"path_gradients: {name} must be >= {least}, got {number}")
