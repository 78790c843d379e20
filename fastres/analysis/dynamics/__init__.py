"""dynamics: what the residuals of a network do from layer to layer (Lagzi, arXiv 2101.03009).

`trajectories` follows them in any model, `logistic` has the system that shared sigmoid layers are,
`noise` what layers make of a perturbation, `iteration` what a block does when it is repeated.
"""

from fastres.analysis.dynamics.iteration import Iteration, iterate
from fastres.analysis.dynamics.logistic import (
    FixedPoint,
    fixed_points,
    jacobian,
    logistic_map,
    logistic_ode,
)
from fastres.analysis.dynamics.noise import (
    Growth,
    injections,
    lyapunov_exponents,
    noise_growth,
    predicted_noise,
    propagated_covariance,
)
from fastres.analysis.dynamics.trajectories import (
    ClassTrajectories,
    by_class,
    convergence,
    residuals,
)

__all__ = [
    "ClassTrajectories",
    "FixedPoint",
    "Growth",
    "Iteration",
    "by_class",
    "convergence",
    "fixed_points",
    "injections",
    "iterate",
    "jacobian",
    "logistic_map",
    "logistic_ode",
    "lyapunov_exponents",
    "noise_growth",
    "predicted_noise",
    "propagated_covariance",
    "residuals",
]
