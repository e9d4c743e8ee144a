"""Behaviour checks, one kit per task: what every method of a task has to keep to, whoever wrote it.

`check_density_model(build, X)` runs all checks of the density task and raises on the first that fails;
`DENSITY_CHECKS` lists them one by one, for parametrised tests.
"""

from paperback.testing.density import DENSITY_CHECKS, DensityCase, check_density_model

__all__ = ["DENSITY_CHECKS", "DensityCase", "check_density_model"]
