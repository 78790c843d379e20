"""analysis: pure functions on what the policies measured."""

from fastres.analysis.depth import PowerLaw, ReciprocalLaw, power_law, reciprocal_law

__all__ = ["PowerLaw", "ReciprocalLaw", "power_law", "reciprocal_law"]
