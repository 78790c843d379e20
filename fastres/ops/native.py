"""native: the compiled libraries that are loaded, or why not, and the operators they brought."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any, Final

import torch

missing: Final[dict[str, str]] = {}  # library -> why it is not loaded


def _load_cpu() -> Any:
    """Import fastres._C, which registers the operators; None where it was not built."""
    try:
        return importlib.import_module("fastres._C")
    except ImportError as error:
        missing["_C"] = str(error)
        warnings.warn(
            "fastres: the compiled library is not loaded, so the plain PyTorch references run "
            "instead; `python -m fastres.info` says why and how to build it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _load_cuda() -> bool:
    """Load fastres/_C_cuda*.so, which adds the CUDA kernels; False where there is none."""
    built = sorted(Path(__file__).parent.parent.glob("_C_cuda*.so"))
    if C is None or not built:
        missing["_C_cuda"] = "_C is not loaded" if C is None else "it was not built"
        return False
    try:
        torch.ops.load_library(str(built[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        missing["_C_cuda"] = str(error)
        return False
    return True


C: Final[Any] = _load_cpu()  # the module, with build_info() and the kernels on NumPy arrays
CPU: Final = C is not None
CUDA: Final = _load_cuda()


def runs_on(t: torch.Tensor) -> bool:
    """Tell whether the compiled operators run where this tensor is."""
    return (t.is_cpu and CPU) or (t.is_cuda and CUDA) or (t.is_meta and CPU)


def raw(name: str) -> Any:
    """Return the raw overload fastres::<name>, or None where no loaded library has it.

    Raw operators know no autograd and check little: only the op's own Python file calls them.
    """
    operator = getattr(torch.ops.fastres, name, None)
    return None if operator is None else operator.default
