"""_C: the compiled library. Importing it registers the operators with torch.

Each operator's CPU kernel is a function of its name on NumPy arrays, without copy or autograd.
"""

from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array", NDArray[np.float64], NDArray[np.float32], NDArray[np.float16])

class BuildInfo(TypedDict):
    """What was built, and what this CPU uses."""

    compiler: str
    cxx_standard: int  # __cplusplus
    isas_built: list[str]  # the slowest first
    isa_in_use: str
    cuda_archs: str  # "80 90"; empty where _C_cuda was not tried
    torch_abi_target: str  # TORCH_TARGET_VERSION: the oldest torch that the library runs on
    built_with_torch: str

def build_info() -> BuildInfo:
    """Return what was built, and what this CPU uses."""

def residual_add(
    x: Array,
    f: Array,
    gate: NDArray[np.float32] | NDArray[np.float64] | None = None,
    relu: bool = False,
) -> tuple[Array, NDArray[np.float32] | NDArray[np.float64]]:
    """Add a gated branch to the stream, y = act(x + p) with p = gate * f.

    Args:
        x: Stream, C-contiguous [B, ...], float64, float32 or float16.
        f: Branch, shape and dtype of x.
        gate: [B], float64 for float64 x, else float32; 1 if None.
        relu: Whether act is the ReLU, else the identity.

    Returns:
        y, like x, and the sums of x*x, p*p and x*p of every sample, [3, B], dtype of gate.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If a shape or layout is another.
    """

def batch_norm_residual(
    x: Array,
    f: Array,
    weight: NDArray[np.float32] | NDArray[np.float64] | None = None,
    bias: NDArray[np.float32] | NDArray[np.float64] | None = None,
    mean: NDArray[np.float32] | NDArray[np.float64] | None = None,
    var: NDArray[np.float32] | NDArray[np.float64] | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[
    Array,
    NDArray[np.float32] | NDArray[np.float64],
    NDArray[np.float32] | NDArray[np.float64],
    NDArray[np.float32] | NDArray[np.float64],
]:
    """Normalise a branch and add it, y = act(x + p).

    The perturbation is p = weight (f - mean) / sqrt(var + eps) + bias.

    Args:
        x: Stream, C-contiguous [B, C, ...], float64, float32 or float16.
        f: Branch, shape and dtype of x.
        weight: [C], as all four float64 for float64 x, else float32; 1 if None.
        bias: 0 if None.
        mean: Of f per channel; that of this f if None.
        var: Likewise, biased; given or not as mean is.
        eps: Added to the variance.
        relu: Whether act is the ReLU, else the identity.

    Returns:
        y, like x; the sums of x*x, p*p and x*p of every sample, [3, B], dtype of weight; mean and
        var that were used.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If a shape or layout is another.
    """

def mlp_stack(
    x: Array, w1: Array, b1: Array, w2: Array, b2: Array, activation: str = "relu"
) -> tuple[Array, NDArray[np.float32] | NDArray[np.float64]]:
    """Run a stack of L residual blocks, x <- x + p with p = W2 act(W1 x + b1) + b2.

    Args:
        x: Stream, C-contiguous [B, D], float64, float32 or float16.
        w1: [L, H, D], dtype of x, as are all weights.
        b1: [L, H].
        w2: [L, D, H].
        b2: [L, D].
        activation: relu, gelu (by erf), gelu_tanh, silu, tanh, sigmoid or identity.

    Returns:
        y, like x, and the sums of x*x, p*p and x*p of every block and sample, [L, 3, B], float64
        for float64 x, else float32.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If a shape, layout or activation is another.
    """

def path_accumulate(
    skip: Array | None,
    branch: Array,
    gradient: Array | None = None,
    before: Array | None = None,
    steps: NDArray[np.int32] | None = None,
    tail: bool = False,
) -> tuple[Array, NDArray[np.float32] | NDArray[np.float64]]:
    """Shift rows by one path length and add them, rows[k] = skip[k] + 2^steps[k] branch[k-1].

    Args:
        skip: C-contiguous [R, B, ...], dtype of branch; 0 if None.
        branch: C-contiguous [R, B, ...] with R >= 1, float64, float32 or float16.
        gradient: [B, ...], dtype of branch, to measure rows*gradient; None: not measured.
        before: What the row before the first brings, [B, ...], dtype of branch; 0 if None.
        steps: [R]; 0 if None.
        tail: Whether the last row also gets branch[R-1].

    Returns:
        The rows, like branch, and their sums of row*row and, with a gradient, row*gradient,
        [1 or 2, R, B], float64 for float64 branch, else float32.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If a shape or layout is another.
    """
