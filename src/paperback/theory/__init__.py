"""Measurements of networks: what theory predicts of them, and what holds.

The functions of this wing take a model, an activation function, an architecture or data, and return a
`Measurement`: the value with its interval, the prediction of theory beside it where there is one, and in
words what the estimator is known to get wrong.
"""

from paperback.theory.adaptive_information import InformationPlane, ebab_edges, mutual_information
from paperback.theory.criticality import (
    Criticality,
    initialize_critical_,
    measure_flow,
    report,
)
from paperback.theory.inductive_bias import InductiveBias, KernelSpace, NetworkSpace, added_bias
from paperback.theory.interface import Measurement

__all__ = [
    "Criticality",
    "InductiveBias",
    "InformationPlane",
    "KernelSpace",
    "Measurement",
    "NetworkSpace",
    "added_bias",
    "ebab_edges",
    "initialize_critical_",
    "measure_flow",
    "mutual_information",
    "report",
]
