"""cli_studies: what the commands `fastres demo` and `fastres study` are told, and how they run."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Describe `fastres demo`."""
    parser.description = (
        "Train residual MLPs of several depths and measure how far each block is from the "
        "identity. Depths that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data", help="digits (default, no files), mnist or cifar10")
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--blocks", type=int, nargs="+", metavar="L", help="depths (6 12 30 60 120 300)")
    option("--width", type=int, help="features of the stream (64)")
    option("--epochs", type=int, help="digits 12, mnist 1, cifar10 2")
    option("--seed", type=int, help="of weights and order (0)")
    option("--out", type=Path, help="folder (fastres-report)")
    option("--device", help="torch device (cpu)")
    option("--threads", type=int, help="CPU threads (1: the matrices are small)")
    option("--fresh", action="store_true", help="train finished depths again")
    parser.set_defaults(run=_run, study="demo")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Describe `fastres study NAME`."""
    parser.description = "Run an experiment of a paper and write its table, JSON and figure."
    names = parser.add_subparsers(title="studies", required=True, metavar="NAME")
    _add_paths(
        names.add_parser("paths", help="the gradient of a ResNet by path length (Veit 2016)")
    )
    _add_littwin_wolf(
        names.add_parser("littwin-wolf", help="do path lengths grow in training? (Littwin 2016)")
    )
    _add_veit(names.add_parser("veit", help="a ResNet with blocks deleted and moved (Veit 2016)"))
    _add_li(names.add_parser("li", help="shortcut depth and the Hessian (Li 2016)"))
    _add_hauser(names.add_parser("hauser", help="perturbation by number of blocks (Hauser 2019)"))
    _add_lagzi(names.add_parser("lagzi", help="residual dynamics and adaptive depth (Lagzi 2021)"))


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Separate the gradient of a pretrained ResNet for CIFAR-10, and of the same untrained, by "
        "path length: exactly, and by the paper's sampling. Batches that an earlier run with the "
        "same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depth", type=int, help="layers of the network, 20 or 56 (56)")
    option("--batches", type=int, help="how many, of test images (8)")
    option("--batch-size", type=int, metavar="B", help="images in each (8)")
    option("--draws", type=int, help="random paths of each length, per batch (4)")
    option("--seed", type=int, help="of untrained weights and paths (0)")
    option("--out", type=Path, help="folder (fastres-paths)")
    option("--fresh", action="store_true", help="measure finished batches again")
    parser.set_defaults(run=_run, study="paths")


def _add_veit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Delete blocks of a pretrained ResNet for CIFAR-10, one, several, and in other orders, and "
        "layers of a plain network trained on digits, and compare with what the paper says. Parts "
        "that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depth", type=int, help="layers, 20 or 56 (56); with --full any 6 n + 2 (110)")
    option("--images", type=int, help="how many test images (1000; with --full 10000)")
    option("--draws", type=int, help="random lesions of each size (3)")
    option("--seed", type=int, help="of the lesions (0)")
    option("--full", action="store_true", default=None, help="train the paper's networks: hours")
    option("--device", help="torch device of --full (cpu)")
    option("--epochs", type=int, help="of each network of --full (164)")
    option("--training-images", type=int, help="of --full (50000)")
    option("--out", type=Path, help="folder (fastres-veit)")
    option("--fresh", action="store_true", help="measure finished parts again")
    parser.set_defaults(run=_run, study="veit")


def _add_littwin_wolf(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the toy of the paper, with batch norm and without, and follow scales, norms and "
        "path lengths. Trainings that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--epochs", type=int, help="of SGD on batches of 50 (12)")
    option("--lr", type=float, help="learning rate (0.002)")
    option("--spread", type=float, help="of the class means, the noise being 1 (1)")
    option("--head", type=float, help="of torch's start of the last layer, how much (0.1)")
    option("--seeds", type=int, help="trainings of each network (3)")
    option("--full", action="store_true", default=None, help="also ResNet-32 on CIFAR-10: hours")
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--device", help="torch device of ResNet-32 (cpu)")
    option("--cifar-epochs", type=int, help="of ResNet-32 (164)")
    option("--images", type=int, help="of each half of CIFAR-10 (50000)")
    option("--out", type=Path, help="folder (fastres-littwin-wolf)")
    option("--fresh", action="store_true", help="train again what is finished")
    parser.set_defaults(run=_run, study="littwin_wolf")


def _add_li(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Condition numbers of plain and n-shortcut networks on MNIST, reduced to 10 whitened "
        "components: at the start, on the way, and the loss they reach at the best rate. Parts "
        "that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depths", type=int, nargs="+", metavar="N", help="matrices (2 4 8 16 32 64 100)")
    option("--epochs", type=int, help="of gradient descent (1000)")
    option("--rates", type=int, help="how many, from 0.001 to 10 (13)")
    option("--seeds", type=int, help="networks of each kind (2)")
    option("--samples", type=int, help="images for networks with relu (300)")
    option("--out", type=Path, help="folder (fastres-li)")
    option("--fresh", action="store_true", help="do finished parts again")
    parser.set_defaults(run=_run, study="li")


def _add_hauser(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train residual networks of many depths on MNIST and CIFAR-10, MLPs and convolutions, and "
        "fit how the perturbation of identity depends on the number of blocks. Networks that an "
        "earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--data", nargs="+", help="mnist, cifar10 or both (mnist cifar10)")
    option("--blocks", type=int, nargs="+", metavar="L", help="of MLPs (6 12 30 60 120 300)")
    option("--conv-blocks", type=int, nargs="+", metavar="L", help="of convolutions (6 12 24)")
    option("--samples", type=int, help="images to train on (5000)")
    option("--epochs", type=int, help="of the MLPs (8)")
    option("--seeds", type=int, help="networks of each kind and depth (3)")
    option("--full", action="store_true", help="all images, 40 epochs, deep convolutions: a GPU")
    option("--device", help="torch device (cpu)")
    option("--out", type=Path, help="folder (fastres-hauser)")
    option("--fresh", action="store_true", help="train again what is finished")
    parser.set_defaults(run=_run, study="hauser")


def _add_lagzi(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Follow the residuals of trained networks from layer to layer, on circles and MNIST: where "
        "they come to rest, which layers can go, what noise becomes. Networks that an earlier run "
        "with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--seeds", type=int, help="networks of each kind on circles (3)")
    option("--width", type=int, help="neurons per layer on MNIST (256)")
    option("--samples", type=int, help="images to train on (10000)")
    option("--epochs", type=int, help="on MNIST (6)")
    option("--full", action="store_true", help="the sizes of the paper: 1064, 60000, 30 epochs")
    option("--device", help="torch device (cpu)")
    option("--out", type=Path, help="folder (fastres-lagzi)")
    option("--fresh", action="store_true", help="train again what is finished")
    parser.set_defaults(run=_run, study="lagzi")


def _run(arguments: argparse.Namespace) -> int:
    """Run a study; what was not given is as its Options say."""
    module: Any = importlib.import_module(f"fastres.studies.{arguments.study}")
    given = {f.name: getattr(arguments, f.name, None) for f in fields(module.Options)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    interrupted: bool = module.run(module.Options(**values)).interrupted
    if interrupted:
        print("fastres: stopped; the same command goes on from here", file=sys.stderr)
    return 130 if interrupted else 0
