"""The honest baselines of the density wing: what a published method has to be measured against.

`IndependentCategorical` knows no dependence at all. `CategoricalMixture` is exact in every operation and
strong on tables; with two states per variable it is the mixture of Bernoullis. `CategoricalRBM` is the
classical undirected model, trained with care. `MaskedNetwork` is no density at all, but the direct way to
complete and to classify.
"""

from paperback.density.baselines.independent import IndependentCategorical
from paperback.density.baselines.masked_network import MaskedNetwork
from paperback.density.baselines.mixture import CategoricalMixture
from paperback.density.baselines.rbm import CategoricalRBM, Inference, Posterior

__all__ = [
    "CategoricalMixture",
    "CategoricalRBM",
    "IndependentCategorical",
    "Inference",
    "MaskedNetwork",
    "Posterior",
]
