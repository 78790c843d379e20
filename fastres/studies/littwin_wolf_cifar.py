"""littwin_wolf_cifar: ResNet-32 on CIFAR-10, its batch norms and kernels epoch by epoch.

Figures 2 and 3 of arXiv 1611.02525: depth 32, the recipe of facebook/fb.resnet.torch, 164 epochs
with drops of the rate after 81 and 122. The norms are those of the convolutions with their batch
norm absorbed. Hours on a GPU; it goes on after the last epoch that was finished.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.depth_tracker import Depth, DepthTracker
from fastres.data import read
from fastres.nn import cifar_resnet
from fastres.studies.cifar_training import Schedule, train_epochs
from fastres.studies.littwin_wolf_report import CIFAR, Part
from fastres.studies.littwin_wolf_toy import Options
from fastres.studies.paths import normalised
from fastres.training import evaluate

DROPS: Final = (81, 122)
TRACKED: Final = 64  # test images on which blocks are measured


def measure_cifar(options: Options) -> Part:
    """Train the network, and measure it before the first and after every epoch."""
    (images, labels), (test, answers) = read("cifar10", options.data_root)
    few = slice(0, options.images)
    device = torch.device(options.device)
    x, y = normalised(images[few]).to(device), torch.from_numpy(labels[few]).long().to(device)
    test_x = normalised(test[few]).to(device)
    test_y = torch.from_numpy(answers[few]).long().to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cifar_resnet(options.depth).to(device)
    known = test_y[:TRACKED]
    tracker = DepthTracker(model, test_x[:TRACKED], lambda out: F.cross_entropy(out, known))
    schedule = Schedule(epochs=options.cifar_epochs, drops=DROPS, nesterov=True)
    notes: list[Any] = []
    checkpoint = options.out / "resnet.safetensors"
    for epoch in train_epochs(model, x, y, schedule, checkpoint, notes):
        row = tracker.measure(epoch, exact=True)
        notes.append(_noted(row, evaluate(model, test_x, test_y, 500)))
    return Part(
        network=CIFAR,
        seed=0,
        **{name: [note[name] for note in notes] for name in notes[0]},
    )


def _noted(row: Depth, error: float) -> dict[str, Any]:
    return {
        "scale": row.scale.tolist(),
        "weight_norm": float(np.sqrt(np.square(row.kernel).mean())),
        "error": error,
        "beta": row.beta,
        "mean_length": row.mean_length,
        "exact_length": row.exact_mean_length,
    }
