"""Scale mixtures of NNGPs: Gaussian processes of wide networks whose last layer has a random scale.

Give the variance of the last layer's weights a prior H. As the width grows, the network's function becomes

    f ~ integral of GP(0, s2 K) H(d s2),

a Student-t process for an inverse gamma H, and another process with heavy tails for any other. The middle of
a prediction stays the GP's; its width is (2 beta + q) / (2 alpha + n) times that of K, with q = y^T K^-1 y:
it answers to how large the targets are. On one data set whose kernel's scale is learned too this gains next
to nothing; where many data sets share a kernel but not a scale it does.

`ScaleMixtureNNGP` is for numbers, `ScaleMixtureClassifier` for classes (with inducing points, SVTP in the
paper). `scale_prior_init` draws finite networks with such a readout, `ensemble_law` is the law of wide ones
after training.

Source: Lee, Yun, Yang and Lee, Scale mixtures of neural network Gaussian processes (ICLR 2022, arXiv
2107.01408).
"""

from paperback.bayes.scale_mixture_nngp.classification import ScaleMixtureClassifier
from paperback.bayes.scale_mixture_nngp.regression import ScaleMixtureNNGP
from paperback.bayes.scale_mixture_nngp.scale_prior import (
    BurrXII,
    Exponential,
    HalfCauchy,
    InverseGamma,
    PointMass,
    ScalePrior,
)
from paperback.bayes.scale_mixture_nngp.trained import ensemble_law, scale_prior_init

__all__ = [
    "BurrXII",
    "Exponential",
    "HalfCauchy",
    "InverseGamma",
    "PointMass",
    "ScaleMixtureClassifier",
    "ScaleMixtureNNGP",
    "ScalePrior",
    "ensemble_law",
    "scale_prior_init",
]
