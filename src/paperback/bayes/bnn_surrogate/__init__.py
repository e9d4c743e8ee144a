"""Seven surrogates for Bayesian optimisation behind one interface, and the loop that swaps them.

Gaussian processes (`GPSurrogate`, `InfiniteBNN`, `DeepKernelGP`) and small Bayesian networks (`HMCSurrogate`,
`SGHMCSurrogate`, `EnsembleSurrogate`, `LaplaceSurrogate`) are regressors of the wing, each a BoTorch model by
`to_botorch()`. `BayesianOptimizer` fits one of them to what was evaluated and maximises an acquisition
function alpha(X) = E_f[utility(f(X))], the expectation over 128 draws of the posterior, for the next q
points; `compare` runs problems, surrogates and trials and ranks them.

Source: Li, Rudner and Wilson, A study of Bayesian neural network surrogates for Bayesian optimization (ICLR
2024, arXiv 2305.20028).
"""

from paperback.bayes.bnn_surrogate.comparison import compare, ranks
from paperback.bayes.bnn_surrogate.gaussian_processes import DeepKernelGP, GPSurrogate, InfiniteBNN
from paperback.bayes.bnn_surrogate.history import History
from paperback.bayes.bnn_surrogate.laplace import LaplaceSurrogate
from paperback.bayes.bnn_surrogate.loop import BayesianOptimizer, bayes_opt
from paperback.bayes.bnn_surrogate.make import SURROGATES, make_surrogate
from paperback.bayes.bnn_surrogate.problems import Problem, network_draw, problem
from paperback.bayes.bnn_surrogate.weight_posteriors import EnsembleSurrogate, HMCSurrogate, SGHMCSurrogate

__all__ = [
    "SURROGATES",
    "BayesianOptimizer",
    "DeepKernelGP",
    "EnsembleSurrogate",
    "GPSurrogate",
    "HMCSurrogate",
    "History",
    "InfiniteBNN",
    "LaplaceSurrogate",
    "Problem",
    "SGHMCSurrogate",
    "bayes_opt",
    "compare",
    "make_surrogate",
    "network_draw",
    "problem",
    "ranks",
]
