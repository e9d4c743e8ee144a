"""Surrogates by name."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from paperback import catalogue
from paperback.bayes.bnn_surrogate.gaussian_processes import DeepKernelGP, GPSurrogate, InfiniteBNN
from paperback.bayes.bnn_surrogate.laplace import LaplaceSurrogate
from paperback.bayes.bnn_surrogate.weight_posteriors import EnsembleSurrogate, HMCSurrogate, SGHMCSurrogate
from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError

SURROGATES: dict[str, type[BayesianRegressor]] = {
    "gp": GPSurrogate,
    "ibnn": InfiniteBNN,
    "dkl": DeepKernelGP,
    "hmc": HMCSurrogate,
    "sghmc": SGHMCSurrogate,
    "ensemble": EnsembleSurrogate,
    "lla": LaplaceSurrogate,
}


def make_surrogate(name: str, **settings: Any) -> BayesianRegressor:
    """A surrogate of the study, or any other regressor of this wing.

    Args:
        name: "gp", "ibnn", "dkl", "hmc", "sghmc", "ensemble" or "lla"; or a method's slug in the catalogue.
        **settings: arguments of its class.

    Returns:
        The unfitted estimator.

    Raises:
        DataError: if there is no regressor of that name.
    """
    cls = SURROGATES.get(name) or _from_catalogue(name)
    if cls is None:
        close = difflib.get_close_matches(name, SURROGATES, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(SURROGATES)}."
        raise DataError(f"there is no surrogate {name!r}; {remedy}")
    return cls(**settings)


def _from_catalogue(name: str) -> type[BayesianRegressor] | None:
    for method in catalogue.methods():
        if method.slug == name and method.task == "bayes" and method.available:
            module, _, attribute = method.object.partition(":")
            found = getattr(importlib.import_module(module), attribute)
            if isinstance(found, type) and issubclass(found, BayesianRegressor):
                return found
    return None
