"""recalibrating: batch norm with the statistics that a changed model has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
@torch.no_grad()
def recalibrated(model: nn.Module, x: Tensor, batch_size: int = 250) -> Iterator[None]:
    """Give batch norm the statistics of these inputs for the length of a `with` block.

    Mean and variance are means over batches of equal weight; everything else is in eval mode while
    they are taken. What a lesion takes away may be information, or only the mean and variance that
    later layers expect: this gives the second back. Afterwards all is as it was, bit for bit.

    Args:
        model: In eval mode.
        x: Inputs, [N, ...], 2 or more.
        batch_size: Samples per pass.

    Raises:
        ValueError: If the model has no batch norm with running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        kind = type(model).__name__
        raise ValueError(f"recalibrated: model must contain batch norm, found none in {kind}")
    before = [({k: v.clone() for k, v in m.named_buffers()}, m.momentum) for m in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum, module.training = None, True
        for start in range(0, len(x) - 1, batch_size):  # a last batch of one has no variance
            model(x[start : start + batch_size])
        for module in norms:
            module.training = False
        yield
    finally:
        for module, (buffers, momentum) in zip(norms, before, strict=True):
            module.momentum, module.training = momentum, False
            for name, value in buffers.items():
                getattr(module, name).copy_(value)
