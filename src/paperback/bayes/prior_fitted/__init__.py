"""Prior-fitted networks: a transformer that learns, from data sets drawn from a prior, to predict.

Fitted once to any prior that can be sampled, the network gives an approximate posterior predictive for every
row of a new data set in one forward pass. Its loss, over data sets D and further rows (x, y) of the prior,

    l(theta) = E[-log q_theta(y | x, D)] = E_{x, D} KL(p(. | x, D) || q_theta(. | x, D)) + const,

has the exact posterior predictive as its minimiser. For regression the network's law is a Riemann
distribution: bars between quantiles of the prior's targets, with half-normal tails.

    network = PriorFittedTransformer(num_features=1, max_context=20)
    fit_prior(network, priors.GP(lengthscale=0.2, noise=0.01), steps=3000)
    law = PriorFittedNetwork(network).fit(X, y).predict_distribution(X_new)

`PriorFittedNetwork.pretrained()` and `PriorFittedClassifier.pretrained()` come with networks that ship.

Source: Müller, Hollmann, Pineda Arango, Grabocka and Hutter, Transformers Can Do Bayesian Inference (2022).
Three things differ from the authors' code: blocks normalise their input instead of their output, which makes
a block with zeroed projections an exact identity; a learned token begins each context, so that it may be
empty; and the expected improvement of a bar that the incumbent cuts is the exact one.
"""

from paperback.bayes.prior_fitted import priors
from paperback.bayes.prior_fitted.estimators import PriorFittedClassifier, PriorFittedNetwork
from paperback.bayes.prior_fitted.riemann import RiemannDistribution, quantile_borders
from paperback.bayes.prior_fitted.training import fit_prior
from paperback.bayes.prior_fitted.transformer import PriorFittedTransformer

__all__ = [
    "PriorFittedClassifier",
    "PriorFittedNetwork",
    "PriorFittedTransformer",
    "RiemannDistribution",
    "fit_prior",
    "priors",
    "quantile_borders",
]
