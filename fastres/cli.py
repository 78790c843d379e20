"""cli: the command `fastres`: demo, inspect, study, info."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

# What a wrong argument, file or installation raises: one line for the user, not a traceback.
# The variable FASTRES_TRACEBACK, set to anything, shows the traceback.
_USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0 done, 2 a wrong argument or file, 130 stopped by Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except _USER_ERRORS as error:
        if os.environ.get("FASTRES_TRACEBACK"):
            raise
        print(f"fastres: {_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastres: stopped", file=sys.stderr)
        return 130
    return code


def _line(error: BaseException) -> str:
    """One line that says what is wrong; an OSError names its file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastres", description="Residual networks, observed at their residual adds."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train residual MLPs of 6 to 300 blocks, measure"))
    _add_inspect(commands.add_parser("inspect", help="list the residual adds of a model"))
    _add_study(commands.add_parser("study", help="an experiment of a paper, from data to table"))
    info = commands.add_parser("info", help="what is loaded, what is not, and why")
    info.set_defaults(run=_info)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train residual MLPs of several depths and measure how far each block is from the "
        "identity. Depths that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data", default="digits", help="digits (default, no files), mnist or cifar10")
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--blocks", type=int, nargs="+", metavar="L", help="depths (6 12 30 60 120 300)")
    option("--width", type=int, default=64, help="features of the stream (64)")
    option("--epochs", type=int, help="digits 12, mnist 1, cifar10 2")
    option("--seed", type=int, default=0, help="of weights and order (0)")
    option("--out", type=Path, default=Path("fastres-report"), help="folder (fastres-report)")
    option("--device", default="cpu", help="torch device (cpu)")
    option("--threads", type=int, default=1, help="CPU threads (1: the matrices are small)")
    option("--fresh", action="store_true", help="train finished depths again")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from fastres.studies import demo

    usual = demo.Options()
    options = demo.Options(
        data=arguments.data,
        data_root=arguments.data_root,
        blocks=usual.blocks if arguments.blocks is None else tuple(arguments.blocks),
        width=arguments.width,
        epochs=arguments.epochs,
        seed=arguments.seed,
        out=arguments.out,
        device=arguments.device,
        threads=arguments.threads,
        fresh=arguments.fresh,
    )
    return _ended(demo.run(options).interrupted)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the residual adds of a model; it is built and run once."
    option = parser.add_argument
    option("model", metavar="MODULE:FACTORY", help="such as torchvision.models:resnet18")
    option("--input", default="1,3,224,224", metavar="SHAPE", help="(1,3,224,224)")
    option("--tokens", action="store_true", help="the input is integers, all 0, not noise")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from fastres import report
    from fastres.sites import trace

    model = _build(arguments.model).eval()
    shape = _shape(arguments.input)
    x = torch.zeros(shape, dtype=torch.int64) if arguments.tokens else torch.randn(shape)
    try:
        with torch.no_grad():
            sites = trace(model, x)
    except (Exception, SystemExit) as error:  # the model's own, on an input that it does not take
        raise ValueError(
            f"inspect: {arguments.model} must take an input {list(shape)}, got {_named(error)}"
        ) from error
    rows = [(s.name, s.kind, "x".join(map(str, s.shape)), str(s.level)) for s in sites]
    if rows:
        print(report.table(("site", "kind", "shape", "level"), rows))
    identity = sum(site.kind == "identity" for site in sites)
    print(f"{len(sites)} sites: {identity} identity, {len(sites) - identity} projection")
    return 0


def _add_study(parser: argparse.ArgumentParser) -> None:
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


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Separate the gradient of a pretrained ResNet for CIFAR-10, and of the same untrained, by "
        "path length: exactly, and by the paper's sampling. Batches that an earlier run with the "
        "same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depth", type=int, default=56, help="layers of the network, 20 or 56 (56)")
    option("--batches", type=int, default=8, help="how many, of test images (8)")
    option("--batch-size", type=int, default=8, metavar="B", help="images in each (8)")
    option("--draws", type=int, default=4, help="random paths of each length, per batch (4)")
    option("--seed", type=int, default=0, help="of untrained weights and paths (0)")
    option("--out", type=Path, default=Path("fastres-paths"), help="folder (fastres-paths)")
    option("--fresh", action="store_true", help="measure finished batches again")
    parser.set_defaults(run=_paths)


def _paths(arguments: argparse.Namespace) -> int:
    from fastres.studies import paths

    options = paths.Options(
        data_root=arguments.data_root,
        depth=arguments.depth,
        batches=arguments.batches,
        batch_size=arguments.batch_size,
        draws=arguments.draws,
        seed=arguments.seed,
        out=arguments.out,
        fresh=arguments.fresh,
    )
    return _ended(paths.run(options).interrupted)


def _add_veit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Delete blocks of a pretrained ResNet for CIFAR-10, one, several, and in other orders, and "
        "compare with what the paper says. Parts that an earlier run with the same arguments has "
        "finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depth", type=int, default=56, help="layers of the network, 20 or 56 (56)")
    option("--images", type=int, default=1000, help="how many test images (1000)")
    option("--draws", type=int, default=3, help="random lesions of each size (3)")
    option("--seed", type=int, default=0, help="of the lesions (0)")
    option("--out", type=Path, default=Path("fastres-veit"), help="folder (fastres-veit)")
    option("--fresh", action="store_true", help="measure finished parts again")
    parser.set_defaults(run=_veit)


def _veit(arguments: argparse.Namespace) -> int:
    from fastres.studies import veit

    options = veit.Options(
        data_root=arguments.data_root,
        depth=arguments.depth,
        images=arguments.images,
        draws=arguments.draws,
        seed=arguments.seed,
        out=arguments.out,
        fresh=arguments.fresh,
    )
    return _ended(veit.run(options).interrupted)


def _add_littwin_wolf(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the toy of the paper, with batch norm and without, and follow scales, norms and "
        "path lengths. Trainings that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--epochs", type=int, default=10, help="of SGD on batches of 50 (10)")
    option("--lr", type=float, default=0.05, help="learning rate (0.05)")
    option("--seeds", type=int, default=3, help="trainings of each network (3)")
    out = Path("fastres-littwin-wolf")
    option("--out", type=Path, default=out, help="folder (fastres-littwin-wolf)")
    option("--fresh", action="store_true", help="train again what is finished")
    parser.set_defaults(run=_littwin_wolf)


def _littwin_wolf(arguments: argparse.Namespace) -> int:
    from fastres.studies import littwin_wolf

    options = littwin_wolf.Options(
        epochs=arguments.epochs,
        lr=arguments.lr,
        seeds=arguments.seeds,
        out=arguments.out,
        fresh=arguments.fresh,
    )
    return _ended(littwin_wolf.run(options).interrupted)


def _add_li(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Condition numbers of plain and n-shortcut networks on MNIST, reduced to 10 whitened "
        "components: at the start, on the way, and the loss they reach at the best rate. Parts "
        "that an earlier run with the same arguments has finished are kept."
    )
    option = parser.add_argument
    option("--data-root", metavar="DIR", help="folder of the files (default: $FASTRES_DATA)")
    option("--depths", type=int, nargs="+", metavar="N", help="matrices (2 4 8 16 32 64 100)")
    option("--epochs", type=int, default=1000, help="of gradient descent (1000)")
    option("--rates", type=int, default=13, help="how many, from 0.001 to 10 (13)")
    option("--seeds", type=int, default=2, help="networks of each kind (2)")
    option("--samples", type=int, default=300, help="images for networks with relu (300)")
    option("--out", type=Path, default=Path("fastres-li"), help="folder (fastres-li)")
    option("--fresh", action="store_true", help="do finished parts again")
    parser.set_defaults(run=_li)


def _li(arguments: argparse.Namespace) -> int:
    from fastres.studies import li, li_pieces

    usual = li_pieces.Options()
    options = li_pieces.Options(
        data_root=arguments.data_root,
        depths=usual.depths if arguments.depths is None else tuple(arguments.depths),
        epochs=arguments.epochs,
        rates=arguments.rates,
        seeds=arguments.seeds,
        samples=arguments.samples,
        out=arguments.out,
        fresh=arguments.fresh,
    )
    return _ended(li.run(options).interrupted)


def _ended(interrupted: bool) -> int:
    if interrupted:
        print("fastres: stopped; the same command goes on from here", file=sys.stderr)
    return 130 if interrupted else 0


def _build(name: str) -> nn.Module:
    """Import MODULE, call FACTORY without arguments; MODULE may lie in the current folder."""
    module, _, factory = name.partition(":")
    if not module or not factory:
        raise ValueError(f"inspect: model must be MODULE:FACTORY, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (Exception, SystemExit) as error:  # not of here: FASTRES_TRACEBACK=1 shows where
        raise ValueError(f"inspect: {name} must make a model, got {_named(error)}") from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"inspect: {name} must make a torch.nn.Module, got {kind}")
    return model


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"inspect: input must be sizes such as 1,3,224,224, got {text!r}")
    return shape


def _info(_arguments: argparse.Namespace) -> int:
    code: int = importlib.import_module("fastres.info").main()
    return code
