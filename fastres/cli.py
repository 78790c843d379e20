"""cli: the command `fastres`: demo, inspect, study, info."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import torch
from torch import nn

from fastres.cli_studies import add_demo, add_study

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
    add_demo(commands.add_parser("demo", help="train residual MLPs of 6 to 300 blocks, measure"))
    _add_inspect(commands.add_parser("inspect", help="list the residual adds of a model"))
    add_study(commands.add_parser("study", help="an experiment of a paper, from data to table"))
    info = commands.add_parser("info", help="what is loaded, what is not, and why")
    info.set_defaults(run=_info)
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the residual adds of a model; it is built and run once. MODULE is imported and "
        "FACTORY called: what they name is code that runs, so name only what you trust."
    )
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
