"""analysis: pure functions on what the policies measured."""

from fastres.analysis.depth import (
    PowerLaw,
    Reaching,
    ReciprocalLaw,
    SeedLaw,
    local_exponents,
    power_law,
    reaching_depth,
    reciprocal_law,
    seed_law,
)

__all__ = [
    "PowerLaw",
    "Reaching",
    "ReciprocalLaw",
    "SeedLaw",
    "local_exponents",
    "power_law",
    "reaching_depth",
    "reciprocal_law",
    "seed_law",
]
