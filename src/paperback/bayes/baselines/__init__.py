"""The honest baselines of the wing: what a Bayesian method has to be measured against.

The exact Gaussian process with BoTorch's current default is `paperback.bayes.bnn_surrogate.GPSurrogate`. All
predict a law and are tuned: the sparse GP by its bound, networks and boosting on rows that are held out.
"""

from paperback.bayes.baselines.deep_ensemble import DeepEnsembleClassifier, DeepEnsembleRegressor
from paperback.bayes.baselines.sparse_gp import SparseGP
from paperback.bayes.baselines.trees import ForestRegressor, QuantileBoosting, QuantileLaw

__all__ = [
    "DeepEnsembleClassifier",
    "DeepEnsembleRegressor",
    "ForestRegressor",
    "QuantileBoosting",
    "QuantileLaw",
    "SparseGP",
]
