"""A classifier on the sphere that takes up new classes without training.

Features and class vectors have length one, so a score is a cosine: p(k|x) = softmax_k(s w_k . z/|z|), without
a bias, |w_k| = 1 after every step. A class that was never trained gets the normalised mean of a few
embeddings as its vector, and is then classified beside the others (joint) or among new classes only
(disjoint). No pairs or triplets are needed, so a training costs what plain softmax costs.

Source: R. S. Pereira, A. Joly, P. Valduriez and F. Porto, Hyperspherical embedding for novel class
classification, 2021, arXiv 2102.03243; the scale follows Wang et al., NormFace, 2017, proposition 2.

Two things are ours. Trained class vectors are not the mean directions of their classes: with a large scale
features stop far from them, new classes with mean vectors are nearer to everything, and the seen classes
lose. So by default seen classes too are represented by their means (`seen`). And predictions can be refused
by a threshold on the cosine.
"""

from paperback.represent.hyperspherical.classifier import HypersphericalClassifier, NovelHead
from paperback.represent.hyperspherical.embedding import MetricLearner
from paperback.represent.hyperspherical.sphere import (
    NormalizedLinear,
    loss_floor,
    normalized_softmax,
    scale_for_probability,
    separated_directions,
)

__all__ = [
    "HypersphericalClassifier",
    "MetricLearner",
    "NormalizedLinear",
    "NovelHead",
    "loss_floor",
    "normalized_softmax",
    "scale_for_probability",
    "separated_directions",
]
