"""Marginalization models: the probability of any subset of discrete variables in one network call.

One head gives m(x_S) = log p(x_S) for any subset S, with "?" in place of the rest. A second one gives the
conditionals of every variable. Self-consistency ties them together, one step of a random order at a time, so
that no step of training sums over states or over an order:

    p(x_S) p(x_i | x_S) = p(x_S, x_i)        loss: D (m(x_S) + log c(x_i | x_S) - m(x_S, x_i))^2 + (m("?") -
    log Z)^2.

Trained from data in two stages (conditionals on random orders, then the marginal head), or without data from
an energy f: REINFORCE with log p(x) in one call ("kl"), or m brought to f ("fm"); samples come from a
persistent chain that draws 4 variables anew in each step.

Source: Liu, Ramadge and Adams, Generative marginalization models (ICML 2024, arXiv 2310.12920); authors' code
PrincetonLIPS/MaM.

What differs from the authors' code, and why:
- Half of the rows of the second stage are used in blocks of random size, not in single steps: one residual
  then spans many variables, and errors do not have to travel D steps to be seen. The chain of conditionals
  through a block is estimated without bias from 4 calls. With ``block_weight=0`` there are single steps only.
  Blocks need conditionals that stand still, so energies are trained by single steps.
- In a quarter of the single steps the added variable gets a random state, so that marginals are right where
  neither data nor samples come, which outliers and draws by Bayes' rule ask about; ``explore=0`` turns it
  off.
- The marginal head adds to the features' linear read-out a field for each symbol, which starts at the product
  of marginals, and the features' inner product with an embedding of the symbols. With dual trunks, that of
  the marginals starts from that of the conditionals.
- Gibbs steps forget random positions, and both sides of a residual go through the network in one call.
- "kl" with ``estimator="conditionals"`` takes D times the mean log c, which estimates log p; the authors
  leave out the D.
- The log ratio of "kl" is divided by its deviation only down to 0.1 nats. Below that, on targets that can be
  met, the authors' scaling amplifies rounding until the model leaves the optimum (KL 0.0000 to 0.1 within 50
  steps).
- "fm" brings m to f on the samples too, in the shares of ``q_mix``, where the authors do it on the rows from
  anywhere only.
- Answers are m(x_S) - m("?"), so that nothing observed has probability one, whatever the constant of training
  was.
- Exact likelihoods use the same orders for every row, and are therefore those of one distribution, a mixture
  that sums to one.
"""

from paperback.density.marginalization.arm import AnyOrderARM
from paperback.density.marginalization.energies import IsingEnergy, PottsEnergy, RewardEnergy
from paperback.density.marginalization.model import InconsistentMarginals, MarginalizationModel

__all__ = [
    "AnyOrderARM",
    "InconsistentMarginals",
    "IsingEnergy",
    "MarginalizationModel",
    "PottsEnergy",
    "RewardEnergy",
]
