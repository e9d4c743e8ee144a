"""Entropy and mutual information from samples: one base for every estimator of this wing.

    from paperback.theory.information import AdaptiveBins, AdaptiveKDE, Sample
    AdaptiveBins(n_bins=30).estimate(Sample(T, y))

`discrete` counts states (plug-in, Miller-Madow), `binning` makes states of activations (adaptive and fixed
edges), `mixture` bounds the entropy of a Gaussian mixture (KDE), `cauchy_schwarz` and `neighbours` hold the
kernel and the nearest-neighbour estimators. `estimators` puts them behind one interface. Units are bits,
but for `cs_qmi`, which is a loss in nats. No estimator here is unbiased: each says in `bias` what it gets
wrong.
"""

from paperback.theory.information.binning import bin_states, ebab_edges, fixed_edges
from paperback.theory.information.cauchy_schwarz import cs_qmi, median_bandwidth
from paperback.theory.information.discrete import (
    Correction,
    discrete_mutual_information,
    entropy,
    join_states,
    number_states,
)
from paperback.theory.information.estimators import (
    ESTIMATORS,
    AdaptiveBins,
    AdaptiveKDE,
    CauchySchwarz,
    Estimate,
    EstimatorName,
    FixedBins,
    InformationEstimator,
    NearestNeighbours,
    Sample,
    make_estimator,
)
from paperback.theory.information.mixture import mixture_information
from paperback.theory.information.neighbours import ksg, ksg_with_labels
from paperback.theory.information.subsampling import Subsampled, subsample

__all__ = [
    "ESTIMATORS",
    "AdaptiveBins",
    "AdaptiveKDE",
    "CauchySchwarz",
    "Correction",
    "Estimate",
    "EstimatorName",
    "FixedBins",
    "InformationEstimator",
    "NearestNeighbours",
    "Sample",
    "Subsampled",
    "bin_states",
    "cs_qmi",
    "discrete_mutual_information",
    "ebab_edges",
    "entropy",
    "fixed_edges",
    "join_states",
    "ksg",
    "ksg_with_labels",
    "make_estimator",
    "median_bandwidth",
    "mixture_information",
    "number_states",
    "subsample",
]
