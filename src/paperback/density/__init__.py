"""Models of a joint distribution over discrete variables.

A density model learns how variables hang together, and then answers questions about any of them from any
others: how probable is this row, what belongs where nothing was observed, which class is it, what would new
data look like. `DensityModel` says what every method of this wing does, and its `capabilities` say how well:
exactly, within bounds, as an estimate, or not at all.

A `TabularGenerator` learns a table as it is, numbers and categories in their own units, and draws new rows.
`BinnedGenerator` makes one of any density model that can draw.
"""

from paperback.density.baselines import (
    CategoricalMixture,
    CategoricalRBM,
    IndependentCategorical,
    MaskedNetwork,
)
from paperback.density.binned import BinnedGenerator
from paperback.density.constrained_tabular import ConstrainedTabular, LinearConstraints
from paperback.density.interface import Capabilities, Classifying, DensityModel, Interval, TabularGenerator
from paperback.density.marginalization import MarginalizationModel
from paperback.density.monotone_dbm import MonotoneDBM
from paperback.density.probabilistic_circuit import PCCompressor, ProbabilisticCircuit

__all__ = [
    "BinnedGenerator",
    "Capabilities",
    "CategoricalMixture",
    "CategoricalRBM",
    "Classifying",
    "ConstrainedTabular",
    "DensityModel",
    "IndependentCategorical",
    "Interval",
    "LinearConstraints",
    "MarginalizationModel",
    "MaskedNetwork",
    "MonotoneDBM",
    "PCCompressor",
    "ProbabilisticCircuit",
    "TabularGenerator",
]
