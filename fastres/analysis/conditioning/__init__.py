"""conditioning: how residual networks are conditioned, at zero and on the way (Li et al. 2016)."""

from fastres.analysis.conditioning.eigenvalues import Eigenvalues, eigenvalues, stationary_order
from fastres.analysis.conditioning.lanczos import SpectralDensity, extreme_eigenvalues, lanczos
from fastres.analysis.conditioning.operators import FunctionHessian, SymmetricOperator
from fastres.analysis.conditioning.stacks import StackHessian
from fastres.analysis.conditioning.theory import Spectrum, ZeroHessian, squared_loss
from fastres.analysis.conditioning.tracking import (
    Curvature,
    CurvatureTracker,
    blocks_of,
    model_hessian,
)
from fastres.analysis.conditioning.zero_branch import ZeroBranch, zero_branch

__all__ = [
    "Curvature",
    "CurvatureTracker",
    "Eigenvalues",
    "FunctionHessian",
    "SpectralDensity",
    "Spectrum",
    "StackHessian",
    "SymmetricOperator",
    "ZeroBranch",
    "ZeroHessian",
    "blocks_of",
    "eigenvalues",
    "extreme_eigenvalues",
    "lanczos",
    "model_hessian",
    "squared_loss",
    "stationary_order",
    "zero_branch",
]
